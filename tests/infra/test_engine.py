"""ZeRO training on gloo ranks: against plain torch, and against itself across kills, world sizes and stages."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORKER = Path(__file__).with_name("engine_worker.py")
STAGES = (1, 2, 3)


class Ranks:
    """Processes that form one process group and run the same function of `engine_worker` at the same time."""

    def __init__(self, world_size: int, folder: Path) -> None:
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        numbers = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = os.environ | numbers | place | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        self.listeners = [Listener(str(folder / f"{rank}.sock"), "AF_UNIX") for rank in range(world_size)]
        with (folder / "log.txt").open("wb") as log:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, str(WORKER), str(listener.address)],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
                for rank, listener in enumerate(self.listeners)
            ]
        self._connections: list[Connection] = []
        self._runs: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
        self.folder = folder

    def call(self, name: str, **options: Any) -> list[Any]:
        """What each rank returned."""
        if not self._connections:
            self._connections = [listener.accept() for listener in self.listeners]
        for connection in self._connections:
            connection.send((name, options))
        answers: dict[int, Any] = {}
        while len(answers) < len(self._connections):
            waiting = [connection for rank, connection in enumerate(self._connections) if rank not in answers]
            for connection in wait(waiting):
                fine, answer = connection.recv()
                assert fine, answer  # at once: the other ranks may wait for this one for ever
                answers[self._connections.index(connection)] = answer
        return [answers[rank] for rank in sorted(answers)]

    def train(self, **options: Any) -> dict[str, Any]:
        """What rank 0 brought back."""
        return self.call("train", **options)[0]

    def known(self, **options: Any) -> dict[str, Any]:
        """The same, of a run that several tests compare others with: it is made once."""
        key = tuple(sorted(options.items()))
        if key not in self._runs:
            self._runs[key] = self.train(**options)
        return self._runs[key]

    def undisturbed(self, **options: Any) -> tuple[dict[str, Any], Path]:
        """A run of six steps, with the folder of its checkpoint after three."""
        checkpoint = self.folder / "-".join(f"{name}={value}" for name, value in sorted(options.items()))
        return self.known(**options, stop=6, save=checkpoint, save_at=3), checkpoint

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.wait()
        for listener in self.listeners:
            listener.close()


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = {world_size: Ranks(world_size, folder / str(world_size)) for world_size in (1, 2)}
    yield ranks
    for group in ranks.values():
        group.close()


@pytest.fixture
def one(all_ranks: dict[int, Ranks]) -> Ranks:
    return all_ranks[1]


@pytest.fixture
def two(all_ranks: dict[int, Ranks]) -> Ranks:
    return all_ranks[2]


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance, err_msg=name)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_equals_plain_torch(one: Ranks, two: Ranks, stage: int) -> None:
    (plain,) = one.call("train_plainly", stop=4)
    sharded = two.known(stage=stage)
    np.testing.assert_allclose(sharded["losses"], plain["losses"], rtol=1e-5)
    np.testing.assert_allclose(sharded["grad_norms"], plain["grad_norms"], rtol=1e-5)
    assert min(plain["grad_norms"]) < 0.25 < max(plain["grad_norms"]), "want steps with and without clipping"
    assert_close(sharded["weights"][0], plain["weights"][0], 2e-5)
    assert_close(sharded["ema"][0], plain["ema"][0], 2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_average_is_of_the_fp32_weights(two: Ranks, stage: int, precision: str) -> None:
    run = two.train(stage=stage, precision=precision, every_step=True)
    assert run["head_dtype"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]
    initial = two.train(stage=stage, stop=1, lr_factor=0.0)["weights"][0]
    average = {name: array.astype(np.float64) for name, array in initial.items()}
    for step, (weights, ema) in enumerate(zip(run["weights"], run["ema"], strict=True)):
        decay = min(0.9, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
        assert_close(ema, average, 1e-6)
    mantissas = run["weights"][-1]["wide.weight"].view(np.uint32) & 0xFFFF
    assert np.count_nonzero(mantissas) > 0.9 * mantissas.size, "weights were rounded to bf16"


def test_autocast_changes_rounding_only(two: Ranks) -> None:
    full, low = two.known(stage=1), two.train(stage=1, precision="bf16")
    assert full["losses"] != low["losses"]
    np.testing.assert_allclose(low["losses"], full["losses"], rtol=2e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_changes_nothing(two: Ranks, stage: int) -> None:
    at_once, in_parts = two.known(stage=stage), two.train(stage=stage, accumulation=2)
    np.testing.assert_allclose(in_parts["losses"], at_once["losses"], rtol=1e-5)
    np.testing.assert_allclose(in_parts["grad_norms"], at_once["grad_norms"], rtol=1e-5)
    assert in_parts["optimizer_step"] == at_once["optimizer_step"] == 4


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_in_between_changes_nothing(two: Ranks, stage: int) -> None:
    assert two.train(stage=stage, evaluate=True)["losses"] == two.known(stage=stage)["losses"]


@pytest.mark.parametrize("stage", STAGES)
def test_non_finite_gradients_of_one_rank_skip_the_update_on_all(two: Ranks, stage: int) -> None:
    run = two.train(stage=stage, poison=(1,), every_step=True)
    assert run["applied"] == [True, False, True, True]
    assert run["grad_norms"][1] == np.inf
    assert run["optimizer_step"] == 3
    for kind in ("weights", "ema"):
        before, skipped, after = run[kind][:3]
        assert all(np.array_equal(before[name], skipped[name]) for name in before)
        assert not np.array_equal(skipped["wide.weight"], after["wide.weight"])
        assert all(np.isfinite(array).all() for array in after.values())


@pytest.mark.parametrize("stage", STAGES)
def test_gives_up_when_no_update_succeeds(two: Ranks, stage: int) -> None:
    for tries, unchanged in two.call("give_up", stage=stage):
        assert tries == 10
        assert unchanged


def test_refuses_what_cannot_work(two: Ranks) -> None:
    for errors in two.call("refusals"):
        nothing, dtype, statistics, device, early_step, early_save, late_backward = errors
        assert "nothing to train" in nothing
        assert "'scale' is torch.float64" in dtype
        assert "'1' keeps running statistics" in statistics
        assert "DeepSpeed was set to 'cpu'" in device
        assert "needs 2 calls of backward" in early_step
        assert "save was called between backward and step" in early_save
        assert "backward was called 3 times without a step" in late_backward


@pytest.mark.parametrize("stage", STAGES)
def test_gathers_trainable_parameters_by_name(one: Ranks, two: Ranks, stage: int) -> None:
    (plain,) = one.call("train_plainly", stop=1)
    shapes = {name: array.shape for name, array in plain["weights"][0].items()}
    shapes["tied_again.weight"] = shapes["tied.weight"]
    gathered = two.known(stage=stage)
    for kind in ("weights", "ema"):
        assert {name: array.shape for name, array in gathered[kind][0].items()} == shapes
        assert np.array_equal(gathered[kind][0]["tied.weight"], gathered[kind][0]["tied_again.weight"])
    assert "unused.weight" in shapes
    assert "frozen.weight" not in shapes


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"stage": stage} for stage in STAGES),
        {"stage": 1, "precision": "bf16", "accumulation": 2},
        {"stage": 2, "offload": True},
        {"stage": 3, "offload": True},
    ],
    ids=["1", "2", "3", "1-bf16-accumulating", "2-offload", "3-offload"],
)
def test_resumes_bit_for_bit(two: Ranks, options: dict[str, Any]) -> None:
    undisturbed, checkpoint = two.undisturbed(**options)
    resumed = two.train(**options, stop=6, load=checkpoint, seed=1)
    assert resumed["losses"] == undisturbed["losses"][3:]
    assert resumed["grad_norms"] == undisturbed["grad_norms"][3:]
    assert resumed["optimizer_step"] == 6
    for kind in ("weights", "ema"):
        for name, array in undisturbed[kind][0].items():
            assert np.array_equal(resumed[kind][0][name], array), (kind, name)


@pytest.mark.parametrize(
    ("world_size", "stage", "new_world_size", "new_stage"),
    [
        (2, 1, 1, 1),
        (1, 1, 2, 1),
        (2, 2, 1, 2),
        (2, 3, 1, 3),
        (1, 3, 2, 3),
        (2, 1, 2, 3),
        (2, 3, 2, 1),
        (2, 2, 2, 3),
        (2, 3, 1, 2),
    ],
)
def test_resumes_on_other_ranks_and_stages(
    all_ranks: dict[int, Ranks], world_size: int, stage: int, new_world_size: int, new_stage: int
) -> None:
    undisturbed, checkpoint = all_ranks[world_size].undisturbed(stage=stage)
    resumed = all_ranks[new_world_size].train(stage=new_stage, stop=6, load=checkpoint, seed=1)
    np.testing.assert_allclose(resumed["losses"], undisturbed["losses"][3:], rtol=2e-6)
    assert_close(resumed["weights"][0], undisturbed["weights"][0], 2e-5)
    assert_close(resumed["ema"][0], undisturbed["ema"][0], 2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_has_trained_goes_back(two: Ranks, tmp_path: Path, stage: int) -> None:
    for losses, again in two.call("go_back", stage=stage, stop=5, save=tmp_path, save_at=2):
        assert losses == again
        assert len(again) == 3


@pytest.mark.parametrize(("stage", "new_stage"), [(1, 3), (2, 1), (3, 2), (3, 3)])
def test_loads_exactly_what_was_saved(one: Ranks, two: Ranks, tmp_path: Path, stage: int, new_stage: int) -> None:
    saved = two.train(stage=stage, stop=2, save=tmp_path / "a", save_at=2)
    loaded = one.call("reload", stage=new_stage, load=tmp_path / "a", save=tmp_path / "b")[0]
    again = two.call("reload", stage=stage, load=tmp_path / "b", save=tmp_path / "c")[0]
    for kind in ("weights", "ema"):
        for name, array in saved[kind][0].items():
            assert np.array_equal(loaded[kind][0][name], array), (kind, name)
            assert np.array_equal(again[kind][0][name], array), (kind, name)
    for file in ("rank_00000.safetensors", "rank_00001.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes(), "moments differ"


def test_saves_safetensors_and_json_alone(two: Ranks, tmp_path: Path) -> None:
    written = [answer["written"] for answer in two.call("train", stage=2, stop=1, save=tmp_path, save_at=1)]
    assert written == [["rank_00000.safetensors", "state.json"], ["rank_00001.safetensors"]]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(name for names in written for name in names)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["position"] == {"step": 1}
    assert (state["world_size"], state["zero_stage"], state["optimizer_step"]) == (2, 2, 1)


def test_names_what_does_not_fit(one: Ranks, two: Ranks, tmp_path: Path) -> None:
    two.train(stage=1, stop=1, save=tmp_path, save_at=1)
    (error,) = one.call("load", stage=1, load=tmp_path, extra_layer=True)
    assert error.startswith("StateMismatch: parameter 'extra.bias' is absent in the saved state and of shape [2]")
    (tmp_path / "rank_00001.safetensors").rename(tmp_path / "elsewhere")
    (error,) = one.call("load", stage=1, load=tmp_path)
    assert error.startswith("StateMismatch: ")
    assert "rank_00001.safetensors is missing" in error
    (tmp_path / "rank_00001.safetensors").write_bytes((tmp_path / "rank_00000.safetensors").read_bytes())
    (error,) = one.call("load", stage=1, load=tmp_path)
    assert "the saved state lacks" in error


def test_objects_reach_all_ranks(two: Ranks) -> None:
    assert two.call("exchange") == [("gloo", "gloo", [{"rank": 0}, {"rank": 1}])] * 2


def test_importing_the_engine_imports_no_deepspeed(one: Ranks) -> None:
    assert one.call("deepspeed_came_along") == [False]
