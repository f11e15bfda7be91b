"""The command line: options, exit codes and how errors look. The verbs themselves: `verbs`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..errors import Error, UsageError

EXIT_INTERNAL, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141

_MODEL = "an .onnx file, a .dcm artifact, or the name of a reference model"
_EPILOG = """exit codes: 0 ok, 1 internal error, 2 usage, 3 model invalid or unsupported,
4 artifact and machine do not fit, 5 accuracy gate failed, 6 performance gate failed,
7 stopped early with a partial result saved"""


class _Parser(argparse.ArgumentParser):
    """Usage errors look like all others, and prefixes of options are not accepted."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        line = f"error DC2000: {message.replace(chr(10), ' ')}. Fix: see '{self.prog} --help'"
        print(line, file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def parser() -> _Parser:
    top = _Parser(
        prog="dccompile",
        description="Compiles ONNX models into one fast file that Python loads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"dccompile {__version__}")
    common = _Parser(add_help=False)
    common.add_argument(
        "-v", "--verbose", action="count", default=0, help="-vv: tracebacks of errors"
    )
    common.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    machine = _Parser(add_help=False)
    machine.add_argument("--json", action="store_true", help="one JSON document on stdout")
    compiling = _Parser(add_help=False)
    compiling.add_argument(
        "--target",
        action="append",
        metavar="T",
        help="host, x86-64-v3, x86-64-v4, x86-64-v4-vnni; cuda:sm_80 and newer",
    )
    compiling.add_argument(
        "--shape", action="append", default=[], metavar="X:DIMS", help="x:1x3x224x224 or x:1..64x13"
    )
    compiling.add_argument(
        "--precision", default="keep", choices=["keep", "fp16-weights", "int8-weights"]
    )
    compiling.add_argument(
        "--embedding",
        default="keep",
        choices=["keep", "fp16", "int8", "int4"],
        help="how rows of embedding tables are stored (keep)",
    )
    summing = _Parser(add_help=False)
    summing.add_argument(
        "--accumulation",
        default="exact",
        choices=["exact", "calibrated"],
        help="16-bit sums without VNNI: for any input, or as calibration allows (exact)",
    )
    tuned = _Parser(add_help=False)
    tuned.add_argument("--tuning", metavar="DIR", help="tuning logs, or none (the packaged ones)")
    tuned.add_argument(
        "--require-tuned", action="store_true", help="exit 7 if a kernel has no tuning record"
    )
    seeded = _Parser(add_help=False)
    seeded.add_argument("--seed", type=int, default=0, help="of a reference model's weights (0)")

    written = _Parser(add_help=False)
    written.add_argument("--log", metavar="DIR", help="where the logs are (the packaged ones)")

    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    add = verbs.add_parser("models", parents=[common, machine], help="list the reference models")
    inner = add.add_subparsers(dest="action", metavar="ACTION")
    add = inner.add_parser("export", parents=[common, seeded], help="write one as ONNX")
    add.add_argument("name", metavar="NAME")
    add.add_argument("-o", "--output", metavar="F.onnx", help="(NAME.onnx)")

    add = verbs.add_parser(
        "check",
        parents=[common, machine, compiling, tuned, seeded],
        help="can it compile, what runs in which precision and why; all problems at once",
    )
    add.add_argument("model", metavar="MODEL", help=_MODEL)

    _add_quantize(
        verbs.add_parser(
            "quantize",
            parents=[common, machine, seeded],
            help="make a QDQ model of a float one, which any runtime can load",
        )
    )

    add = verbs.add_parser(
        "compile",
        parents=[common, machine, compiling, summing, tuned, seeded],
        help="make one .dcm file",
    )
    add.add_argument("model", metavar="MODEL", help=_MODEL)
    add.add_argument("-o", "--output", metavar="F.dcm", help="(the model's name, here)")
    add.add_argument("--explain", action="store_true", help="every node and kernel, and why")

    add = verbs.add_parser(
        "run",
        parents=[common, machine, compiling, summing, tuned, seeded],
        help="one call, saves outputs",
    )
    add.add_argument("model", metavar="MODEL", help=_MODEL)
    add.add_argument(
        "--input", action="append", default=[], metavar="X=V", help="@F.npy or random:SEED"
    )
    add.add_argument("--batch", type=int, default=1, metavar="N", help="open dims of random inputs")
    add.add_argument("--output", metavar="DIR", help="save every output as NAME.npy")
    add.add_argument(
        "--expect", action="append", default=[], metavar="Y=@F.npy", help="exit 5 unless close"
    )
    add.add_argument("--rtol", type=float, default=1e-4, help="(1e-4)")
    add.add_argument("--atol", type=float, default=1e-6, help="(1e-6)")
    add.add_argument("--threads", type=int, metavar="N")
    add.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (cpu)")

    add = verbs.add_parser(
        "bench",
        parents=[common, machine, compiling, tuned, seeded],
        help="latency and throughput, in turns with other runtimes",
    )
    add.add_argument("model", metavar="MODEL", nargs="?", help=_MODEL)
    what = add.add_mutually_exclusive_group()
    what.add_argument(
        "--kernels",
        nargs="?",
        const="",
        metavar="GLOB",
        help="kernels over the deployed shapes: of gemm_*, conv_*, groupconv_*, depthwise_* or "
        "embedding_bag_*, or those chosen for gemm, conv2d, groupconv2d, depthwise2d, depthwise3d "
        "(default: all of these)",
    )
    what.add_argument("--overhead", action="store_true", help="what a call of a tiny model costs")
    what.add_argument(
        "--quantize",
        nargs="?",
        const="",
        metavar="NAMES",
        help="accuracy of quantized reference models (the vision models), against ONNX Runtime's",
    )
    add.add_argument("--samples", type=int, default=8, metavar="N", help="of --quantize (8)")
    add.add_argument("--against", metavar="PEERS", help="onnxruntime,openvino,torch,tvm")
    add.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (cpu)")
    add.add_argument("--threads", action="append", metavar="N[,N]", help="(1)")
    add.add_argument("--batch", action="append", metavar="N[,N]", help="open dims (1)")
    add.add_argument("--input", action="append", default=[], metavar="X=V")
    add.add_argument("--duration", metavar="TIME", help="(3s; --kernels: 1s a shape)")
    add.add_argument("--warmup", default="200ms", metavar="TIME", help="(200ms)")
    add.add_argument(
        "--fail-below", type=float, metavar="R", help="exit 6 below R times the best peer"
    )

    add = verbs.add_parser(
        "tune",
        parents=[common, machine, compiling, written],
        help="find the fastest parameters of a model's kernels; can be stopped and goes on",
    )
    add.add_argument("model", metavar="MODEL", nargs="*", help="an .onnx file or reference model")
    add.add_argument("--kernels", nargs="?", const="*", metavar="GLOB", help="and deployed shapes")
    add.add_argument("--seed", type=int, default=0, help="of the search and its data (0)")
    add.add_argument("--budget", metavar="B", help="30m or 2000trials (all trials)")
    add.add_argument("--task", default="*", metavar="GLOB", help="kernels or labels of tasks (*)")
    add.add_argument(
        "--workers", metavar="N|URL", help="processes here (cores), or tcp://SCHEDULER:PORT"
    )
    add.add_argument("--dry-run", action="store_true", help="list tasks, spaces, estimated time")

    add = verbs.add_parser(
        "worker", parents=[common], help="measure trials for tuning jobs on other machines"
    )
    add.add_argument("scheduler", metavar="URL", help="of dask's scheduler, tcp://HOST:PORT")
    add.add_argument("--name", metavar="NAME", help="what it is called there (the host's, PID)")

    add = verbs.add_parser("records", help="care of tuning logs")
    inner = add.add_subparsers(dest="action", required=True, metavar="ACTION")
    logs = _Parser(add_help=False)
    logs.add_argument("folder", metavar="DIR", nargs="?", help="(the packaged logs)")
    inner.add_parser(
        "verify",
        parents=[common, machine, logs],
        help="is every line readable, of today's schedules, legal; exit 7 if not",
    )
    add = inner.add_parser(
        "stats",
        parents=[common, machine, written, compiling, seeded],
        help="coverage of models and gain over the defaults; without models of every log",
    )
    add.add_argument("model", metavar="MODEL", nargs="*", help=_MODEL)
    add = inner.add_parser(
        "merge", parents=[common, machine, written], help="take in the records of other folders"
    )
    add.add_argument("source", metavar="SRC", nargs="+", help="folders of logs")
    add = inner.add_parser(
        "prune", parents=[common, machine, logs], help="drop stale, illegal, broken, double lines"
    )
    add.add_argument("--dry-run", action="store_true", help="say what would be dropped")
    add = inner.add_parser(
        "replay",
        parents=[common, machine, logs, seeded],
        help="measure winners against the defaults again, here; exit 7 if one no longer holds",
    )
    add.add_argument("--target", action="append", metavar="T", help="(all that this host runs)")
    add.add_argument("--task", default="*", metavar="GLOB", help="kernels or labels of tasks (*)")
    add.add_argument("--duration", default="300ms", metavar="TIME", help="of each (300ms)")
    add.add_argument("--workers", type=int, default=1, metavar="N", help="processes here (1)")
    add.add_argument("--update", action="store_true", help="write the figures found into the logs")

    _add_accuracy(
        verbs.add_parser(
            "accuracy",
            parents=[common, machine, seeded],
            help="error of every layer of a quantized model against float",
        )
    )

    add = verbs.add_parser(
        "inspect", parents=[common, machine], help="what is in an artifact; runs none of it"
    )
    add.add_argument("model", metavar="F.dcm")
    add.add_argument("--asm", metavar="KERNEL", help="disassemble a kernel")
    add.add_argument("--target", metavar="T", help="the variant to disassemble (the first)")

    verbs.add_parser(
        "doctor", parents=[common, machine], help="machine, ISA, threads, versions, peers found"
    )
    return top


def _add_quantize(add: argparse.ArgumentParser) -> None:
    add.add_argument("model", metavar="MODEL", help="a float .onnx file or reference model")
    add.add_argument("-o", "--output", metavar="F.onnx", help="(MODEL-int8.onnx)")
    add.add_argument(
        "--calib", metavar="DATA", help="F.npz, a folder of them, or random:N: samples for ranges"
    )
    add.add_argument("--method", default="l2", help="l2, minmax, percentile or entropy (l2)")
    add.add_argument(
        "--activations",
        default="static",
        help="static, or only fully-connected layers: dynamic, dynamic-rows, float (static)",
    )
    add.add_argument(
        "--selective", action="store_true", help="leave in float what costs most, to --max-drop"
    )
    add.add_argument("--val", metavar="F.npz", help="inputs and labels for --metric (--calib)")
    add.add_argument(
        "--metric", metavar="M:F", help="f(outputs, data), larger is better (1 - relative error)"
    )
    add.add_argument("--max-drop", type=float, default=0.01, metavar="R", help="relative (0.01)")
    add.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="nodes to leave in float"
    )
    add.add_argument("--granularity", default="channel", help="channel, group or tensor (channel)")
    add.add_argument(
        "--outliers", type=float, metavar="SHARE", help="of weights beyond +-64, without VNNI"
    )
    add.add_argument(
        "--acc16", action="store_true", help="16-bit sums for compile --accumulation calibrated"
    )
    add.add_argument(
        "--no-net-aware", dest="net_aware", action="store_false", help="a pair at every tensor"
    )
    add.add_argument(
        "--fuse-sums", action="store_true", help="one rounding less in residual sums, for dccompile"
    )
    add.add_argument(
        "--no-bias-correction", dest="bias_correction", action="store_false", help="keep biases"
    )
    add.add_argument("--shape", action="append", default=[], metavar="X:DIMS", help="x:1x3x224x224")
    add.add_argument("--threads", type=int, metavar="N")


def _add_accuracy(add: argparse.ArgumentParser) -> None:
    add.add_argument("model", metavar="MODEL", help="a QDQ .onnx file or reference model")
    add.add_argument("--reference", metavar="F.onnx", help="the float model it was made from")
    add.add_argument(
        "--data", metavar="DATA", required=True, help="F.npz, a folder of them, or random:N"
    )
    add.add_argument("--top", type=int, default=20, metavar="N", help="worst layers shown (20)")
    add.add_argument("--fail-below", metavar="20dB", help="exit 5 if an output is worse")
    add.add_argument("--shape", action="append", default=[], metavar="X:DIMS", help="x:1x3x224x224")
    add.add_argument("--threads", type=int, metavar="N")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, version or an error
        return int(stop.code or 0)
    try:
        from . import verbs

        code = verbs.VERBS[options.verb](options)
        sys.stdout.flush()
        return code
    except Error as error:
        _show(error.lines(), options.verbose)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # whoever read the output has left; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            return _internal(error, options.verbose)
        fix = f"pip install 'dccompile[{_EXTRAS[missing]}]'"
        text = f"'{options.verb}' needs the package {missing}. Fix: {fix}"
        _show([f"error {UsageError.code}: {text}"], options.verbose)
        return EXIT_USAGE
    except Exception as error:
        return _internal(error, options.verbose)


_EXTRAS = {"tvm": "compile", "onnx": "compile", "ml_dtypes": "compile", "optuna": "tune"}


def _internal(error: Exception, verbose: int) -> int:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    _show([f"error DC1000: {text}. Fix: report this, with what -vv shows"], verbose)
    return EXIT_INTERNAL


def _show(lines: list[str], verbose: int) -> None:
    """Error lines on stderr, below the traceback with -vv; called while the error is handled."""
    if verbose > 1:
        traceback.print_exc()
    for line in lines:
        print(line, file=sys.stderr)


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def entry() -> NoReturn:
    """The installed command: as `main`, and SIGTERM unwinds so that nothing half-done stays."""
    signal.signal(signal.SIGTERM, _terminated)
    raise SystemExit(main())


if __name__ == "__main__":
    entry()
