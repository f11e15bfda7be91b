"""Tables of ``dccompile bench --kernels``."""

from __future__ import annotations

from typing import Any

from ..console import out, table


def difference_text(difference: dict[str, Any]) -> str:
    """``equal``, ``1 step``, ``2e-07 relative``."""
    if "shape" in difference:
        return f"shapes {difference['shape']}"
    parts = []
    if difference.get("steps"):
        parts.append(f"{difference['steps']} step{'s' if difference['steps'] > 1 else ''}")
    if difference.get("relative"):
        parts.append(f"{difference['relative']:.1e} relative")
    return ", ".join(parts) or "equal"


def shape(row: dict[str, Any]) -> str:
    return str(row.get("label") or "x".join(map(str, row["shape"])))


def kernel_tables(result: dict[str, Any]) -> None:
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    table_rows = []
    for row in rows:
        ratios = [row["peers"].get(name, {}).get("ratio") for name in names]
        table_rows.append(
            (
                row["kernel"],
                row["form"],
                row["machine"],
                shape(row),
                f"{row['us']:.2f} [{row['p20']:.2f}, {row['p80']:.2f}]",
                row["gops"],
                round(100 * row["peak_share"], 1),
                *(r and round(r, 2) for r in ratios),
                row["best_ratio"] and round(row["best_ratio"], 2),
                _route(row),
                "" if row["correct"] else f"WRONG: {difference_text(row['difference'])}",
            )
        )
    headers = ("kernel", "form", "machine", "shape", "us [p20, p80]", "Gop/s", "% peak")
    out(f"threads: {result['threads']}; ratios: time of the peer by ours, above 1 ours is faster")
    versus = (*(f"vs-{name}" for name in names), "vs-best")
    table((*headers, *versus, "timed by", ""), table_rows)
    out()
    means = [("kernel", result["geometric_means"])]
    if len(result["family_means"]) < len(result["geometric_means"]):
        means.append(("family", result["family_means"]))
    for title, found in means:
        _mean_table(title, found, names)
        out()
    out("timed by chain: the kernel alone, ours too; by call: one call from Python of each")
    out("one call of a tiny operator, us: what each pays beside the kernel")
    for label, times in result["call_overhead_us"].items():
        out(f"  {label}: " + ", ".join(f"{name} {us:.1f}" for name, us in times.items()))
    _reasons(rows)


def gpu_tables(result: dict[str, Any]) -> None:
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    limits = result["peaks"]
    peaks = ", ".join(f"{name} {limits[name]:.0f}" for name in ("int8", "f16", "f32"))
    out(f"{result['gpu']}, measured peaks: {peaks} Gop/s, memory {limits['memory']:.0f} GB/s")
    out("ratios: time of the peer by ours, above 1 ours is faster; both are the device's own")
    headers = ("kernel", "form", "shape", "us [p20, p80]", "Gop/s", "GB/s", "% of", "bound")
    versus = (*(f"vs-{name}" for name in names), "vs-best", "")
    lines = []
    for row in rows:
        ratios = [row["peers"].get(name, {}).get("ratio") for name in names]
        lines.append(
            (
                row["kernel"],
                row["form"],
                shape(row),
                f"{row['us']:.2f} [{row['p20']:.2f}, {row['p80']:.2f}]",
                row["gops"],
                row["gbs"],
                round(100 * row["peak_share"], 1),
                row["bound"],
                *(r and round(r, 2) for r in (*ratios, row["best_ratio"])),
                f"WRONG: {row['wrong']}" if row["wrong"] else "",
            )
        )
    table((*headers, *versus), lines)
    out()
    _mean_table("kernel", result["geometric_means"], names)
    notes = {f"  {name}: {p['route']}" for r in rows for name, p in r["peers"].items()
             if "route" in p}  # fmt: skip
    for line in sorted(notes):
        out(line)
    _reasons(rows)


def _mean_table(title: str, means: list[dict[str, Any]], names: list[str]) -> None:
    rows = []
    for mean in means:
        shares = [mean["peak_share_large"], mean["peak_share_large_min"]]
        rows.append(
            (
                f"{mean.get('kernel', mean['machine'])} {mean['form']} {mean['family']}",
                *(share and round(100 * share, 1) for share in shares),
                *(mean["ratio"].get(name) for name in names),
                mean["best"],
                mean["best_large"],
                mean["best_min"],
                f"{mean['faster']} of {mean['shapes']}",
            )
        )
    headers = (f"geometric mean, {title}", "% peak*", "least", *(f"vs-{name}" for name in names))
    table((*headers, "vs-best", "vs-best*", "least", "faster"), rows)
    out("* of products those with M >= 10 and N, K >= 256; convolutions count taps in the padding")


def _route(row: dict[str, Any]) -> str:
    """How the best peer was timed."""
    best = row["best_peer"]
    return "" if best is None else str(row["peers"][best]["route"])


def _reasons(rows: list[dict[str, Any]]) -> None:
    """Why a peer is missing: each reason once."""
    seen: dict[str, None] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if "reason" in peer:
                seen[f"  {name}, {row['form']}: {peer['reason']}"] = None
            elif not peer["agrees"]:
                label = shape(row)
                text = difference_text(peer["difference"])
                seen[f"  {name}, {row['form']} {label}: differs from the reference, {text}"] = None
    for line in seen:
        out(line)
