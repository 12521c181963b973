"""Contexts of CLIP's text towers, held against the stock pipelines and open_clip; all models are tiny and random."""

from __future__ import annotations

import json
import logging
import string
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from ldm.clip import build_clip, save_clip
from ldm.conditioning.clip_text import (
    OPENCLIP,
    SDXL_FIRST,
    SDXL_SECOND,
    ClipLayer,
    ClipTextEncoder,
    OpenClipTextEncoder,
    PairedTextEncoder,
    load_clip_text,
    load_open_clip_text,
    load_sdxl_text,
)
from ldm.errors import ConfigError, FolderError, InputError

PROMPTS = ["a red apple", "flag of france", ""]
LONG = "long words in a prompt that goes on " * 6
START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}


def save_tokenizer(folder: Path, pad: str = END) -> None:
    letters = string.ascii_lowercase + "!"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ap", START, END]
    vocab = {token: number for number, token in enumerate(tokens)}
    options: dict[str, Any] = {"pad_token": pad, "model_max_length": 77}
    if pad == END:
        transformers.CLIPTokenizer(vocab=vocab, merges=[("a", "p")], **options).save_pretrained(folder)
        return
    # As published models have them.
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na p\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | options | {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True})
    )


def save_tower(folder: Path, seed: int, *, width: int = 16, layers: int = 3, projection: bool = False) -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=57,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=12,
        bos_token_id=55,
        eos_token_id=56,
        pad_token_id=56,
        # With the usual 0.02, layers of this width differ by less than the tests' tolerance.
        initializer_range=1.0,
    )
    torch.manual_seed(seed)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    kind(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text folders of both kinds of pipeline."""
    folder = tmp_path_factory.mktemp("model")
    save_tower(folder / "text_encoder", 0)
    save_tower(folder / "text_encoder_2", 1, width=24, projection=True)
    save_tokenizer(folder / "tokenizer")
    save_tokenizer(folder / "tokenizer_2", pad="!")
    return folder


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[str, Any]:
    """What the stock pipelines are made of."""
    torch.manual_seed(2)
    return {
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "unet": diffusers.UNet2DConditionModel(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            cross_attention_dim=16,
            norm_num_groups=8,
            attention_head_dim=8,
        ),
        "vae": diffusers.AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    }


@pytest.fixture(scope="module")
def stable_diffusion(parts: dict[str, Any]) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False)  # fmt: skip


@pytest.fixture(scope="module")
def sdxl(parts: dict[str, Any], folder: Path) -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(
        **parts,
        text_encoder_2=transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(3)
    save_clip(build_clip(OPEN_CLIP).state_dict(), OPEN_CLIP, folder)
    return folder


def load_first(folder: Path, **options: Any) -> ClipTextEncoder:
    return load_clip_text(folder / "text_encoder", folder / "tokenizer", name="clip", **options)


def load_second(folder: Path, **options: Any) -> ClipTextEncoder:
    return load_clip_text(folder / "text_encoder_2", folder / "tokenizer_2", name="clip", **options)


def close(ours: torch.Tensor | None, theirs: torch.Tensor) -> None:
    assert ours is not None
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# -- transformers ------------------------------------------------------------------------------------------------------


def test_contexts_are_those_of_stable_diffusion(
    folder: Path, stable_diffusion: diffusers.StableDiffusionPipeline
) -> None:
    encoder = load_first(folder)
    theirs, empty = stable_diffusion.encode_prompt([*PROMPTS, LONG], "cpu", 1, True)
    conditioning = encoder.encode([*PROMPTS, LONG])
    close(conditioning.context, theirs)
    close(encoder.null(4).context, empty)
    assert conditioning.mask is None
    assert conditioning.pooled is None
    assert not conditioning.context.is_inference()
    assert (encoder.length, encoder.width) == (77, 16)


def test_a_skipped_layer_is_as_a_tower_without_it(folder: Path, tmp_path: Path) -> None:
    """Diffusers folders of Stable Diffusion 2 have 23 of the tower's 24 layers."""
    whole = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    whole.encoder.layers = whole.encoder.layers[:-1]
    whole.config.num_hidden_layers -= 1
    whole.save_pretrained(tmp_path)
    short = load_clip_text(tmp_path, folder / "tokenizer", name="short")
    close(load_first(folder, layer=ClipLayer(skipped=1)).encode(PROMPTS).context, short.encode(PROMPTS).context)
    assert not torch.allclose(load_first(folder).encode(PROMPTS).context, short.encode(PROMPTS).context, atol=0.1)


@pytest.mark.parametrize("skipped", [1, 2])
def test_contexts_are_those_of_stable_diffusion_xl(
    folder: Path, sdxl: diffusers.StableDiffusionXLPipeline, skipped: int
) -> None:
    theirs, empty, pooled, empty_pooled = sdxl.encode_prompt(
        [*PROMPTS, LONG], device="cpu", clip_skip=None if skipped == 1 else skipped - 1
    )
    first = load_first(folder, layer=ClipLayer(skipped=skipped, final_norm=False))
    second = load_second(folder, layer=ClipLayer(skipped=skipped, final_norm=False, pooled=True))
    paired = PairedTextEncoder(first, second, null="zeros")
    conditioning, null = paired.encode([*PROMPTS, LONG]), paired.null(4)
    close(conditioning.context, theirs)
    close(conditioning.pooled, pooled)
    assert conditioning.context.shape == (4, paired.length, paired.width) == (4, 77, 40)
    assert torch.equal(null.context, empty)
    assert null.pooled is not None
    assert torch.equal(null.pooled, empty_pooled)


def test_null_of_two_towers_may_be_the_empty_prompt(folder: Path, sdxl: diffusers.StableDiffusionXLPipeline) -> None:
    _, empty, _, empty_pooled = sdxl.encode_prompt(PROMPTS, device="cpu", negative_prompt="")
    null = load_sdxl_text(folder, null="empty").null(3)
    close(null.context, empty)
    close(null.pooled, empty_pooled)


def test_identities_tell_states_apart(folder: Path) -> None:
    layers = [ClipLayer(), ClipLayer(skipped=1), SDXL_FIRST]
    identities = {load_first(folder, layer=layer).identity for layer in layers}
    assert len(identities) == 3
    assert load_first(folder).identity in identities
    assert load_sdxl_text(folder).identity != load_sdxl_text(folder, null="empty").identity


# -- long prompts ------------------------------------------------------------------------------------------------------


def test_long_prompts_are_cut_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_first(folder).encode(["a", LONG])
    assert "1 of 2 prompts have more than 77 tokens and are cut" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_long_prompts_are_kept_in_chunks(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Letters are tokens here, so that 75 of them fill a chunk between its start and end."""
    text = "x" * 75 + "y" * 75 + "z" * 3
    encoder = load_first(folder, long_prompts="chunks")
    conditioning = encoder.encode([text, "a red apple"])
    assert not caplog.records
    assert conditioning.context.shape == (2, 3 * 77, 16)
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 153
    for chunk in range(3):
        own = [55, *ids[75 * chunk : 75 * chunk + 75], 56]
        alone = encoder.network(torch.tensor([own + [56] * (77 - len(own))])).last_hidden_state
        close(conditioning.context[:1, 77 * chunk : 77 * chunk + 77], alone)
    assert conditioning.mask is not None
    assert conditioning.mask.sum(dim=1).tolist() == [3 * 77, 77]
    close(conditioning.context[1:, :77], encoder.encode(["a red apple"]).context)
    dropped = conditioning.where_null(torch.tensor([True, False]), encoder.null(1))
    close(dropped.context[0].view(3, 77, 16), encoder.null(3).context)


def test_chunks_of_equal_number_need_no_mask(folder: Path) -> None:
    encoder = load_first(folder, long_prompts="chunks")
    assert encoder.encode(["a", "b"]).mask is None
    assert encoder.encode(["x" * 80, "y" * 90]).mask is None


def test_two_towers_keep_chunks_together(folder: Path) -> None:
    paired = load_sdxl_text(folder, long_prompts="chunks")
    conditioning = paired.encode(["x " * 80, "y"])
    assert conditioning.context.shape == (2, 154, 40)
    assert conditioning.mask is not None
    assert conditioning.pooled is not None
    first = paired.encode(["x " * 75]).pooled
    assert first is not None
    close(conditioning.pooled[:1], first)


def test_towers_that_split_differently_are_refused(folder: Path) -> None:
    first, second = load_first(folder, long_prompts="chunks"), load_second(folder)
    with pytest.raises(InputError, match="154 and 77 positions"):
        PairedTextEncoder(first, second).encode(["x" * 80])


# -- open_clip ---------------------------------------------------------------------------------------------------------


def test_open_clips_states_and_embedding_are_its_own(open_clip_folder: Path) -> None:
    import open_clip

    encoder = load_open_clip_text(open_clip_folder)
    model = open_clip.create_model(f"local-dir:{open_clip_folder}", require_pretrained=True).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")([*PROMPTS, LONG * 4])
    with torch.no_grad():
        embedded = model.encode_text(tokens)
        hidden = model.token_embedding(tokens) + model.positional_embedding
        for block in model.transformer.resblocks[:-1]:
            hidden = block(hidden, attn_mask=model.attn_mask)
        states = model.ln_final(hidden)
    conditioning = encoder.encode([*PROMPTS, LONG * 4])
    close(conditioning.context, states)
    assert conditioning.pooled is not None
    torch.testing.assert_close(conditioning.pooled, embedded, rtol=1e-5, atol=1e-5)
    assert conditioning.context.shape == (4, encoder.length, encoder.width) == (4, 77, 16)
    close(encoder.null(2).context, encoder.encode(["", ""]).context)


def test_open_clips_long_prompts(open_clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "cat " * 75 + "dog " * 3
    cut = load_open_clip_text(open_clip_folder).encode([text, "cat"])
    assert "1 of 2 prompts have more than 77 tokens" in caplog.text
    caplog.clear()
    encoder = load_open_clip_text(open_clip_folder, long_prompts="chunks")
    kept = encoder.encode([text, "cat"])
    assert not caplog.records
    assert kept.context.shape == (2, 154, 16)
    close(kept.context[:1, :77], cut.context[:1])
    close(kept.context[:1, 77:], encoder.encode(["dog dog dog"]).context)
    assert kept.mask is not None
    assert kept.mask.sum(dim=1).tolist() == [154, 77]


def test_identity_is_of_the_text_tower_alone(open_clip_folder: Path) -> None:
    encoder = load_open_clip_text(open_clip_folder)
    model = build_clip(OPEN_CLIP)
    state = encoder.network.state_dict()
    model.load_state_dict(state, strict=False)
    other = OpenClipTextEncoder(model, encoder.tokenizer, name=encoder.name)
    assert other.identity == encoder.identity
    assert load_open_clip_text(open_clip_folder, layer=ClipLayer(pooled=True)).identity != encoder.identity


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[], "a red apple", [1]])
def test_prompts_must_be_a_list_of_strings(folder: Path, open_clip_folder: Path, prompts: Any) -> None:
    for encoder in (load_first(folder), load_open_clip_text(open_clip_folder), load_sdxl_text(folder)):
        with pytest.raises(InputError, match="list of at least one string"):
            encoder.encode(prompts)


def test_layers_and_options_that_do_not_exist_are_refused(folder: Path, open_clip_folder: Path) -> None:
    with pytest.raises(ConfigError, match="skipped layers = 3: the tower has 3"):
        load_first(folder, layer=ClipLayer(skipped=3))
    with pytest.raises(ConfigError, match="skipped layers = 3: the tower has 3"):
        load_open_clip_text(open_clip_folder, layer=ClipLayer(skipped=3))
    with pytest.raises(ConfigError, match="skipped layers = -1"):
        ClipLayer(skipped=-1)
    for load in (load_first, lambda _, **options: load_open_clip_text(open_clip_folder, **options)):
        with pytest.raises(ConfigError, match="long_prompts = 'lost': must be one of cut, chunks"):
            load(folder, long_prompts="lost")
    with pytest.raises(ConfigError, match="null = 'none'"):
        load_sdxl_text(folder, null="none")  # type: ignore[arg-type]
    plain = load_first(folder)
    with pytest.raises(ConfigError, match="CLIPTextModelWithProjection"):
        ClipTextEncoder(plain.network, plain.tokenizer, name="clip", layer=SDXL_SECOND)


def test_a_tower_without_its_projection_lacks_weights(folder: Path) -> None:
    with pytest.raises(FolderError, match="lacks 1 weights of its CLIPTextModelWithProjection, such as text_proj"):
        load_first(folder, layer=OPENCLIP)


def test_folders_of_others_are_refused(folder: Path, open_clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"config.json is absent"):
        load_clip_text(tmp_path, folder / "tokenizer", name="none")
    with pytest.raises(FolderError, match=r"neither tokenizer.json, nor vocab.json"):
        load_clip_text(folder / "text_encoder", tmp_path, name="none")
    with pytest.raises(FolderError, match=r"open_clip_config.json is absent"):
        load_open_clip_text(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FolderError, match="model_type must be clip_text_model"):
        load_clip_text(tmp_path, folder / "tokenizer", name="none")


def test_corrupt_weights_and_pickles_are_refused(tmp_path: Path, open_clip_folder: Path) -> None:
    save_tower(tmp_path / "text_encoder", 0)
    save_tokenizer(tmp_path / "tokenizer")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FolderError, match=r"CLIPTextModel in .* can't be read"):
        load_first(tmp_path)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(FolderError, match="never from pickles"):
        load_first(tmp_path)
    copy = tmp_path / "open_clip"
    copy.mkdir()
    for path in open_clip_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes()[:300] if path.suffix == ".safetensors" else path.read_bytes())
    with pytest.raises(FolderError, match="can't be read"):
        load_open_clip_text(copy)
    (copy / "open_clip_model.safetensors").rename(copy / "open_clip_pytorch_model.bin")
    with pytest.raises(FolderError, match=r"open_clip_model.safetensors is absent"):
        load_open_clip_text(copy)
