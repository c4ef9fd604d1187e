"""The source distribution has what its tests need, and the installed package what its commands need."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
NOT_OURS = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "site")


def test_distributions_hold_every_file_they_need(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=NOT_OURS)
    wanted = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (sdist,), (wheel,) = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted - held == set()
    with zipfile.ZipFile(wheel) as package:
        installed = {name for name in package.namelist() if name.startswith("fundamentallm/")}
    assert installed == {name for name in wanted if name.startswith("fundamentallm/")}
