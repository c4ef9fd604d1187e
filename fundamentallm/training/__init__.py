"""The trainer and its plain parts."""
