"""What a loaded artifact needs: the file format and the calls. No compiler in sight."""
