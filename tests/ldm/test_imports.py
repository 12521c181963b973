from __future__ import annotations

import pkgutil
import subprocess
import sys

import ldm

FOREIGN = (
    "ray", "deepspeed", "mlflow", "dagster", "webdataset", "img2dataset", "pyarrow", "transformers", "diffusers",
    "open_clip", "torchvision", "PIL", "infra", "pipelines",
)  # fmt: skip


def test_importing_everything_takes_along_only_torch_numpy_and_safetensors() -> None:
    names = [module.name for module in pkgutil.walk_packages(ldm.__path__, "ldm.")]
    assert "ldm.conditioning.text" in names
    code = f"import sys\nimport {', '.join(names)}\nprint(*(name for name in {FOREIGN} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
