from __future__ import annotations

from typing import Any

import pytest

# Ray Data's own defaults trip over its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")


def test_a_local_trainer_does_all_but_ask_a_dashboard_that_is_not_there(tmp_path: Any) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from infra.trainer import LocalTorchTrainer

    callbacks = [
        [
            type(one).__name__
            for one in kind(
                print,
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=2),
                run_config=RunConfig(name="test", storage_path=str(tmp_path)),
            )._create_default_callbacks()
        ]
        for kind in (TorchTrainer, LocalTorchTrainer)
    ]
    assert [name for name in callbacks[0] if name not in callbacks[1]] == ["PlacementGroupCleanerCallback"]
    assert callbacks[1] == [name for name in callbacks[0] if name != "PlacementGroupCleanerCallback"]
