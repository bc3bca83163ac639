"""A gateway imports the links; it must not pay for torch."""

import subprocess
import sys
from pathlib import Path

import router.links


def test_all_links_but_those_of_gpus_import_without_torch():
    names = {path.stem for path in Path(router.links.__file__).parent.glob("*.py")}
    names -= {"rows", "nccl", "__init__"}
    assert "stream" in names
    imports = "; ".join(f"import router.links.{name}" for name in sorted(names))
    program = f"import sys; sys.modules['torch'] = None; {imports}; import router.placement"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
