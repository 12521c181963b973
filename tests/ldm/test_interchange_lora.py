"""LoRA files merged into a model, against the formula in diffusers' own networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from stock import stock_pipeline
from torch import Tensor

from ldm.errors import ConfigError, FolderError
from ldm.generate import LatentDiffusion
from ldm.interchange import load_model, load_single_file, merge_lora
from ldm.interchange.lora import Pair, _factor

SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
PROMPTS = ["a red apple"]
RANK = 2
UNET = [
    *("conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1", "mid_block.resnets.1.conv2"),
    *(
        "down_blocks.0.resnets.0.time_emb_proj",
        "up_blocks.0.resnets.0.conv_shortcut",
        "down_blocks.0.downsamplers.0.conv",
    ),
    *("down_blocks.1.attentions.0.proj_in", "mid_block.attentions.0.proj_out", "up_blocks.0.upsamplers.0.conv"),
    *(
        f"{block}.attentions.0.transformer_blocks.0.{layer}"
        for block in ("down_blocks.1", "mid_block", "up_blocks.1")
        for layer in ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
    ),
]
TEXT = [f"encoder.layers.1.{layer}" for layer in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")]

Matrices = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""Down and up by part and layer."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    for kind in (SD, XL):
        stock_pipeline(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in (SD, XL)}


def layer_of(pipeline: Any, part: str, name: str) -> Any:
    network = getattr(pipeline, part)
    return getattr(network, "text_model", network).get_submodule(name)


def matrices(pipeline: Any) -> Matrices:
    """Random ones for a choice of layers of each network."""
    generator = torch.Generator().manual_seed(5)
    places = [("unet", name) for name in UNET] + [
        (part, name) for part in ("text_encoder", "text_encoder_2") if hasattr(pipeline, part) for name in TEXT
    ]
    found: Matrices = {}
    for part, name in places:
        wide, *inner = layer_of(pipeline, part, name).weight.shape
        down = torch.randn(RANK, *inner, generator=generator) * 0.2
        found[part, name] = down, torch.randn(wide, RANK, *[1] * (len(inner) - 1), generator=generator) * 0.2
    return found


def outputs(pipeline: Any, kind: str) -> list[Tensor]:
    """The text's states and the U-Net's output, of the stock pipeline."""
    states = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = {"text_embeds": states[2], "time_ids": torch.arange(6.0).view(1, 6)} if kind == XL else {}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return [states[0], pipeline.unet(noise, torch.tensor([500]), states[0], added_cond_kwargs=added).sample]


def our_outputs(model: LatentDiffusion, kind: str) -> list[Tensor]:
    conditioning = model.text_encoder.encode(PROMPTS)
    added = {"pooled_BP": conditioning.pooled, "sizes_BS": torch.arange(6.0).view(1, 6)} if kind == XL else {}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return [conditioning.context, model.unet(noise, torch.tensor([500]), conditioning.context, **added)]


def peft_names(found: Matrices) -> dict[str, Tensor]:
    return {
        f"{part}.{'text_model.' if part != 'unet' else ''}{name}.lora_{which}.weight": value
        for (part, name), pair in found.items()
        for which, value in zip("AB", pair, strict=True)
    }


def plain_names(found: Matrices) -> dict[str, Tensor]:
    named = peft_names(found)
    return {re.sub(r"lora_([AB])", lambda m: {"A": "lora.down", "B": "lora.up"}[m[1]], k): v for k, v in named.items()}


def old_names(found: Matrices) -> dict[str, Tensor]:
    """diffusers' before it used peft: attention's processors in the U-Net, and both forms of its text towers'."""
    named = {}
    for name, value in plain_names(found).items():
        name = re.sub(r"(attn\d)\.to_(q|k|v|out)(?:\.0)?\.lora\.", r"\1.processor.to_\2_lora.", name)  # noqa: PLW2901
        name = re.sub(r"\.out_proj\.lora\.", ".to_out_lora.", name)  # noqa: PLW2901
        named[re.sub(r"((?:q_proj|fc\d))\.lora\.", r"\1.lora_linear_layer.", name)] = value
    return named


def kohya_names(found: Matrices, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    return {
        starts[part]
        + rename(("" if part == "unet" else "text_model.") + name).replace(".", "_")
        + f".lora_{which}.weight": value
        for (part, name), pair in found.items()
        for which, value in zip(("down", "up"), pair, strict=True)
    }


def original(name: str) -> str:
    """A layer's name in kohya's own U-Net for XL, for some of the layers above."""
    blocks = {"down_blocks.1": "input_blocks.3.1", "mid_block": "middle_block.1", "up_blocks.1": "output_blocks.2.1"}
    block, _, layers = name.partition(".attentions.0.")
    return f"{blocks[block]}.{layers}"


@pytest.mark.parametrize("kind", [SD, XL])
@pytest.mark.parametrize("names", [peft_names, plain_names, old_names, kohya_names])
@torch.no_grad()
def test_each_naming_is_merged_by_the_formula(
    kind: str, names: Callable[[Matrices], dict[str, Tensor]], folders: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = stock_pipeline(kind)
    found = matrices(pipeline)
    file = tmp_path / "lora.safetensors"
    save_file(names(found), file)
    model = load_model(folders[kind])
    before = our_outputs(model, kind)
    empty = model.text_encoder.null(1).context.clone()
    identity = model.text_encoder.identity
    merge_lora(model, file, 0.7)
    for (part, name), (down, up) in found.items():
        weight = layer_of(pipeline, part, name).weight
        weight += 0.7 * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view_as(weight)
    for ours, theirs, without in zip(our_outputs(model, kind), outputs(pipeline, kind), before, strict=True):
        assert float((ours - without).abs().max()) > 0.01
        # Two implementations in float32, of values up to about 5.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert model.text_encoder.identity != identity
    if kind == SD:  # XL's empty prompt is zeros
        assert not torch.equal(model.text_encoder.null(1).context, empty)


def merged(folder: Path, file: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """Weights of all networks after merging."""
    model = load_model(folder)
    merge_lora(model, file, scale)
    return weights_of(model)


def weights_of(model: LatentDiffusion) -> dict[str, Tensor]:
    encoder: Any = model.text_encoder
    towers = [encoder.network] if hasattr(encoder, "network") else [encoder.first.network, encoder.second.network]
    networks = [model.unet, *towers]
    return {
        f"{at}.{name}": value.clone() for at, each in enumerate(networks) for name, value in each.state_dict().items()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6, msg=name)  # one sum in another order


def test_alphas_and_pefts_configuration_scale_each_layer(folders: dict[str, Path], tmp_path: Path) -> None:
    found = matrices(stock_pipeline(SD))
    first, second = ("unet", UNET[3]), ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    expected = {place: tuple(pair) for place, pair in found.items()}
    for place in expected:
        factor = {first: 6 / RANK, second: 1 / RANK}.get(place, 3 / RANK if place[0] == "unet" else 1 / RANK**0.5)
        expected[place] = found[place][0], found[place][1] * factor
    save_file(peft_names(expected), tmp_path / "expected.safetensors")
    goal = merged(folders[SD], tmp_path / "expected.safetensors", 0.5)

    # with an α beside each, in kohya's form and in diffusers'
    for names in (kohya_names, old_names):
        file = tmp_path / f"{names.__name__}.safetensors"
        alphas = {
            place: torch.tensor(float(expected[place][1].sum() / found[place][1].sum()) * RANK) for place in found
        }
        named = {}
        for place, pair in found.items():
            own = names({place: pair})
            named |= own | {re.sub(r"\.(lora_)?(lora\.)?down\.weight$", ".alpha", min(own)): alphas[place]}
        save_file(named, file)
        assert_same(merged(folders[SD], file, 0.5), goal)

    # as diffusers writes it, with peft's configuration
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}}
    for name, value in peft_names(found).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    usual = {
        "r": RANK,
        "lora_dropout": 0.1,
        "bias": "none",
        "init_lora_weights": "gaussian",
        "target_modules": ["to_q"],
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "saved",
        unet_lora_layers=parts["unet"],
        text_encoder_lora_layers=parts["text_encoder"],
        unet_lora_adapter_metadata=usual
        | {"lora_alpha": 3, "alpha_pattern": {UNET[3]: 6, "mid_block.*.attn1.to_q": 1}},
        text_encoder_lora_adapter_metadata=usual | {"lora_alpha": 1, "use_rslora": True, "peft_type": "LORA"},
    )
    assert_same(merged(folders[SD], tmp_path / "saved", 0.5), goal)


def test_patterns_of_a_text_encoder_are_of_either_name_of_its_layers() -> None:
    """Versions of transformers differ in a leading `text_model`."""
    pair = Pair(down=torch.ones(2, 4), up=torch.ones(4, 2), alpha=None)
    place = ("text_encoder", "encoder.layers.0.self_attn.q_proj")
    for name in (place[1], f"text_model.{place[1]}", "q_proj"):
        settings = {"text_encoder": {"r": 2, "lora_alpha": 2, "alpha_pattern": {name: 6}}}
        assert _factor(Path("a.safetensors"), place, pair, settings) == 3


def test_kohyas_original_names_are_diffusers_names(folders: dict[str, Path], tmp_path: Path) -> None:
    """By diffusers' own translation of names."""
    file, translated = tmp_path / "kohya.safetensors", tmp_path / "translated.safetensors"
    found = {place: pair for place, pair in matrices(stock_pipeline(XL)).items() if "transformer_blocks" in place[1]}
    save_file(kohya_names(found, original), file)
    config = stock_pipeline(XL).unet.config
    state, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=config)
    assert sorted({name.split(".")[1] for name in state}) == ["down_blocks", "mid_block", "up_blocks"]
    save_file({name: value.clone() for name, value in state.items()}, translated)
    ours = merged(folders[XL], file)
    assert_same(ours, merged(folders[XL], translated))
    assert_same(ours, merged(folders[XL], save(tmp_path, peft_names(found))))


def save(folder: Path, weights: dict[str, Tensor], **header: Any) -> Path:
    metadata = {"lora_adapter_metadata": json.dumps(header)} if header else None
    save_file(weights, folder / "lora.safetensors", metadata=metadata)
    return folder / "lora.safetensors"


def test_types_memory_formats_and_parameters_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(folders[SD], torch.bfloat16).for_inference()
    file = save(tmp_path, peft_names(matrices(stock_pipeline(SD))))
    weight = model.unet.down_blocks[0].resnets[0].conv1.weight  # type: ignore[union-attr, index]
    assert isinstance(weight, Tensor)
    before = weight.float().clone()
    merge_lora(model, file, 2.0)
    assert weight is model.unet.down_blocks[0].resnets[0].conv1.weight  # type: ignore[union-attr, index]
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    found = load_file(file)
    down, up = (found[f"unet.{UNET[3]}.lora_{which}.weight"].flatten(1) for which in "AB")
    # Rounded to bfloat16 once.
    torch.testing.assert_close(weight.float(), before + 2 * (up @ down).view_as(before), rtol=2**-8, atol=1e-6)


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
GOOD = {f"{Q}.lora_A.weight": torch.ones(2, 64), f"{Q}.lora_B.weight": torch.ones(64, 2)}


@pytest.mark.parametrize(
    ("weights", "header", "message"),
    [
        ({}, {}, "no tensors"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 64)}, {}, r"lacks the up matrix of unet\.mid_block"),
        (GOOD | {"unet.mid_block.nothing.lora_A.weight": torch.ones(1)}, {}, r"has unet.mid_block.nothing.*no layer"),
        (GOOD | {"text_encoder_2.x.lora_A.weight": torch.ones(1)}, {}, "has text_encoder_2.x"),
        (GOOD | {"lora_unet_x.lora_down.weight": torch.ones(1)}, {}, "has lora_unet_x.lora_down.weight"),
        (GOOD | {"transformer.x.weight": torch.ones(1)}, {}, "has transformer.x.weight"),
        (GOOD | {f"{Q}.lora_A.weight": torch.ones(2, 32)}, {}, r"\(2, 32\) and \(64, 2\), which don't fit.*\(64, 64\)"),
        (GOOD | {f"{Q}.lora_B.weight": torch.ones(64, 3)}, {}, r"don't fit"),
        (GOOD | {f"{Q}.lora_A.weight": torch.ones(2, 64, 1, 1)}, {}, r"don't fit"),
        (GOOD | {f"{Q}.lora_A.weight": torch.ones(2, 64, dtype=torch.int8)}, {}, "down is torch.int8"),
        (GOOD | {f"{Q}.lora_A.weight": torch.full((2, 64), torch.nan)}, {}, "not numbers"),
        (GOOD | {f"{Q}.lora.down.weight": torch.ones(2, 64)}, {}, "another down"),
        (GOOD | {f"{Q}.lora_magnitude_vector": torch.ones(64)}, {}, "DoRA is not supported"),
        (GOOD | {"lora_unet_x.dora_scale": torch.ones(64)}, {}, "DoRA is not supported"),
        (GOOD | {"lora_unet_x.hada_w1_a": torch.ones(64)}, {}, "LoHa is not supported"),
        (GOOD | {"lora_unet_x.lokr_w1": torch.ones(64)}, {}, "LoKr is not supported"),
        (GOOD | {f"{Q}.lora_B.bias": torch.ones(64)}, {}, "biases is not supported"),
        (GOOD | {f"{Q}.alpha": torch.ones(2)}, {}, "alpha of unet.mid_block"),
        (GOOD | {f"{Q}.alpha": torch.ones(())}, {"unet.lora_alpha": 2, "unet.r": 2}, "only one can be meant"),
        (GOOD, {"unet.lora_alpha": 2, "unet.r": 4}, "has rank 4 and alpha 2, its matrices rank 2"),
        (GOOD, {"unet.lora_alpha": "x", "unet.r": 2}, "alpha 'x'"),
        (GOOD, {"unet.use_dora": True}, "unet.use_dora = True is not supported"),
        (GOOD, {"unet.init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        (GOOD, {"unet.something_new": [1]}, "something_new"),
    ],
)
def test_what_has_no_place_is_refused_and_nothing_is_merged(
    weights: dict[str, Tensor], header: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(folders[SD])
    before = weights_of(model)
    with pytest.raises(FolderError, match=message):
        merge_lora(model, save(tmp_path, {name: value.clone() for name, value in weights.items()}, **header))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(model).items())


def test_other_files_and_scales_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(folders[SD])
    file = save(tmp_path, {name: value.clone() for name, value in GOOD.items()})
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"scale = {scale}"):
            merge_lora(model, file, scale)
    with pytest.raises(FolderError, match=r"pytorch_lora_weights.safetensors is absent"):
        merge_lora(model, tmp_path)
    with pytest.raises(FolderError, match="is a pickle"):
        merge_lora(model, tmp_path / "lora.bin")


@pytest.mark.parametrize("names", [peft_names, plain_names, old_names, kohya_names])
def test_a_lora_given_as_a_model_is_called_one(names: Callable[[Matrices], dict[str, Tensor]], tmp_path: Path) -> None:
    place = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    save_file(names({place: (torch.ones(2, 64), torch.ones(64, 2))}), tmp_path / "pytorch_lora_weights.safetensors")
    for load, path in ((load_single_file, tmp_path / "pytorch_lora_weights.safetensors"), (load_model, tmp_path)):
        with pytest.raises(FolderError, match=r"is a LoRA, and not a model: give it with --lora"):
            load(path)
