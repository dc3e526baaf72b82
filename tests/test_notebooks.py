"""The notebooks of docs/ run, with fewer steps and episodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs/notebooks"
ACT_WORKS = "\nassert chart.to_dict()['encoding'].keys() == {'x', 'y'} and 0 < returns[0] < 1000\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shorter", "check"),
    [
        ("act", {"episodes=20": "episodes=2", '"steps": 60': '"steps": 2', "range(3)": "range(1)"}, ACT_WORKS),
        ("ring", {"steps=20": "steps=2"}, ""),  # compares the losses of the plain transformer and of the ring itself
    ],
    ids=["act", "ring"],
)
def test_a_notebook_runs(name: str, shorter: dict[str, str], check: str, tmp_path: Path) -> None:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs are not stored"
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for long, short in shorter.items():
        assert long in code
        code = code.replace(long, short)
    (tmp_path / "code.py").write_text(code + check)
    own = os.environ | {"TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, tmp_path / "code.py"], env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
