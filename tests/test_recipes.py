"""The papers' recipes: each one is valid, sourced and buildable; where options are from; what a dry run says."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch

from mlhead import building, cli, dry_run, recipes
from mlhead._config import TrainConfig
from mlhead._usage import UsageError
from mlhead.data.sources import ImageSpec, backbone_image_spec, training_transform

timm = pytest.importorskip("timm")
pytest.importorskip("yaml")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parent.parent
BUILD = building.build_backbone


@functools.cache
def backbone(name, options):
    """A backbone on the meta device, built once for all recipes that have it."""
    with torch.device("meta"):
        return BUILD(TrainConfig(backbone=name, backbone_opt=dict(options)), 3)


@pytest.fixture
def cached(monkeypatch):
    """Makes build_model take copies of such backbones."""

    def copied(config, channels):
        return copy.deepcopy(backbone(config.backbone, tuple(config.backbone_opt.items())))

    monkeypatch.setattr(building, "build_backbone", copied)


# The recipes themselves


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_a_valid_run_of_a_model_that_builds(name, cached):
    recipe = recipes.load(name)
    config = recipe.config()
    assert re.fullmatch(r"(MLD|CSRA) (Tables? \d+(, \d+)*|\d\.\d)", recipe.paper["table"])
    assert 0 < recipe.paper["value"] < 100
    assert {"num_classes", "image_size", "backbone", "head", "epochs", "lr", "batch_size"} <= recipe.origins.keys()
    if config.pretrained:
        assert timm.models.is_model_pretrained(config.backbone)
    seen = 925 if config.task == "zero-shot" else config.num_classes
    with torch.device("meta"):
        model = building.build_model(config, seen, 3, load_weights=False)
    assert model.num_classes == seen
    assert all(p.is_meta for p in model.parameters())
    building.build_loss(config)
    building.build_optimizer(config, model)


def test_every_value_has_its_source():
    for name in recipes.names():
        text = (recipes.FOLDER / f"{name}.yaml").read_text()
        text = re.sub(r"^(#|base:|paper:).*\n", "", re.sub(r"^notes: >-\n(  .*\n)+", "", text, flags=re.M), flags=re.M)
        assert text, name
        for line in text.splitlines():
            if not line.endswith(":"):  # the options of a head, a loss, ... follow, each with its own
                assert re.search(r" # (ours|MLD|CSRA)\b", line), f"{name}: {line}"


def test_the_page_is_made_of_the_recipes():
    page = (ROOT / "docs/recipes.md").read_text()
    assert page.endswith(recipes.page()), "docs/recipes.md must end with mlhead.recipes.page()"
    for name in recipes.names():
        assert f"| `{name}` |" in page


def test_scores_and_values_of_some_rows():
    best = recipes.load("coco-tresnet_l-ml_decoder-448")
    assert best.score() == "mAP 90.0 (MLD Tables 5, 10)"
    config = best.config()
    assert (config.lr, config.weight_decay, config.epochs, config.cutout) == (2e-4, 1e-4, 40, 0.5)
    assert config.loss_opt == {"gamma_neg": 4, "gamma_pos": 0, "margin": 0.05}
    config = recipes.load("coco-vit_l16-csra").config()
    assert (config.head_opt, config.lr, config.head_lr_mult) == ({"num_heads": 8, "lam": 1.0}, 0.01, 10)
    assert config.optimizer_opt == {"momentum": 0.9}
    config = recipes.load("nus_wide-tresnet_m-zero_shot-noise").config()
    assert (config.query_noise > 0, config.random_queries) == (True, 0)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_what_is_wrong_with_a_recipe_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"'coco-resnet101-csar' \(did you mean 'coco-resnet101-csra'"):
        recipes.load("coco-resnet101-csar")
    own = write(tmp_path / "own.yaml", "base: coco-resnet101-csra\nlr: 0.1\n")
    with pytest.raises(UsageError, match="must be a recipe without a base, got 'coco-resnet101-csra'"):
        recipes.load(own)
    with pytest.raises(UsageError, match=r"own\.yaml must be made of known options, got 'lrr'"):
        recipes.load(write(tmp_path / "own.yaml", "lrr: 1\n"))
    with pytest.raises(UsageError, match="a mapping with metric, value and table for paper, got 90"):
        recipes.load(write(tmp_path / "own.yaml", "paper: 90\n"))
    with pytest.raises(UsageError, match="a mapping with text for base and notes, got 3"):
        recipes.load(write(tmp_path / "own.yaml", "notes: 3\n"))


# The command line


def test_recipe_then_config_then_flags_and_the_dry_run_says_so(tmp_path, capsys):
    own = write(tmp_path / "own.yaml", "base: voc2007-resnet101-csra\nbackbone: resnet18\nimage_size: 64\nlr: 0.5\n")
    config = write(tmp_path / "more.yaml", "lr: 0.25\nbatch_size: 4\n")
    out = tmp_path / "run"
    flags = ["--batch-size", "8", "--head-opt", "num_heads=2", "--out", str(out)]
    assert cli.main(["train", "--recipe", own, "--config", config, "--dry-run", *flags]) == 0
    assert not out.exists()
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("  ")}
    rows = {name: re.sub(" +", " ", value) for name, value in rows.items()}
    assert rows["lr"] == f"0.25 --config {config}"
    assert rows["batch_size"] == "8 --batch-size"
    assert rows["backbone"] == "11,176,512 parameters"
    assert rows["image_size"] == "64 recipe own"
    assert rows["epochs"] == "30.0 recipe voc2007-resnet101-csra"
    assert rows["head_opt"] == "{'num_heads': 2} --head-opt"
    assert rows["head"] == f"{2 * 20 * 512:,} parameters"
    assert rows["data"] == "not given default"
    assert rows["seed"] == "0 default"
    assert "recipe own: of your own" in text


def test_the_dry_run_asks_the_data_or_for_the_classes(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    labels = write(tmp_path / "labels.csv", "image,labels,split\na.png,cat;dog;emu,train\n")
    model = ["--head", "gap", "--image-size", "40"]
    assert cli.main(["train", "--dry-run", *model, "--data", str(tmp_path), "--labels", labels]) == 0
    assert re.search(r"classes +3\n", capsys.readouterr().out)
    missing = ["train", "--dry-run", *model, "--data", str(tmp_path / "none")]
    assert cli.main(missing) == 2
    assert "--num-classes must be given for --dry-run where the data is not there" in capsys.readouterr().err
    assert cli.main([*missing, "--num-classes", "7"]) == 0
    assert re.search(r"classes +7\n", capsys.readouterr().out)
    assert cli.main(["train", "--dry-run", *model]) == 0
    assert re.search(r"image +1 x 40 x 40\n", capsys.readouterr().out)
    assert cli.main(["train", "--dry-run", "--task", "zero-shot", "--image-size", "40"]) == 0
    text = capsys.readouterr().out
    assert "80 trained, 20 known by word vectors alone" in text
    assert re.search(r"fused_loss +True +--task\n", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "coco-resnet101-csra"], "--data must be given with --recipe, got None"),
        (["--recipe", "coco-resnet1-csra"], "(did you mean 'coco-resnet101-csra'"),
        (["--resume", "x", "--recipe", "y"], "--recipe must be absent on --resume"),
        (["--resume", "x", "--dry-run"], "--dry-run must be absent on --resume"),
        (["--unseen", "0.5"], "--unseen must be absent without --task zero-shot, got 0.5"),
        (["--query-noise", "0.5"], "--query-noise must be absent without --task zero-shot, got 0.5"),
        (["--random-queries", "3"], "--random-queries must be absent without --task zero-shot, got 3"),
        (["--word-vectors", "x"], "--word-vectors must be absent without --task zero-shot, got x"),
        (["--mixup", "0.2", "--fused-loss"], "--mixup must be 0 with the loss in the head"),
        (["--cutmix", "1", "--task", "zero-shot"], "--cutmix must be 0 with the loss in the head"),
        (["--mix-threshold", "0.2"], "--mix-threshold must be absent without --mixup or --cutmix"),
        (["--cutout", "1"], "--cutout must be below 1"),
        (["--crop-pct", "1.5"], "--crop-pct must be above 0 and at most 1, got 1.5"),
        (["--random-erasing", "2"], "--random-erasing must be a probability, got 2.0"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# What a dry run counts

PLAN = {"backbone": "resnet18", "head": "gap", "num_classes": 10, "image_size": 64, "batch_size": 4, "data": "none"}


def plan(**options):
    return dry_run.plan(TrainConfig(**{**PLAN, **options}), given_classes=True, given_data=False)


def test_counts_are_those_of_the_real_model():
    found = plan(ema=0.9)
    model = building.build_model(TrainConfig(**PLAN), 10, 3).train()
    assert found.backbone + found.head == sum(p.numel() for p in model.parameters())
    weights = 4 * (found.backbone + found.head)
    extra = sum(b.numel() * b.itemsize for b in model.buffers())
    assert found.bytes["weights"] == found.bytes["moving average"] == weights + extra
    assert found.bytes["gradients"] == weights
    steps = 4 * len(list(model.parameters()))  # AdamW counts the steps of each parameter
    assert found.bytes["state of adamw"] == 2 * weights + steps
    assert found.bytes["logits and loss"] == 4 * 10 * 12

    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(4, 3, 64, 64))
    assert found.bytes["activations"] == sum(s.nbytes() for pointer, s in kept.items() if pointer not in own)


def test_mixed_precision_halves_activations_and_sgd_keeps_nothing():
    whole, half = plan(), plan(amp="bf16", optimizer="momentum", optimizer_opt={"momentum": 0.0})
    # Integers, such as the positions of a pooling's maxima, stay as they are.
    assert 0.5 <= half.bytes["activations"] / whole.bytes["activations"] < 0.6
    assert half.bytes["state of momentum"] == 0


# Flops columns of MLD Tables 1, 2 and 10, in G multiply-adds.
FLOPS = {
    "coco-tresnet_m-gap": 23.0,
    "coco-tresnet_m-transformer_decoder": 24.1,
    "open_images-tresnet_m-ml_decoder-200": 6.7,
    "coco-tresnet_l-ml_decoder-448": 36.2,
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_are_the_papers(name, cached):
    config = recipes.load(name).config()
    with torch.device("meta"):
        model = building.build_model(config, config.num_classes, 3, load_weights=False)
    flops = dry_run._flops(model, backbone_image_spec(config, model.backbone)) / 2e9
    # Half a unit of the last digit, and what some counters add for norms and activations, well below 1 % here.
    assert abs(flops - FLOPS[name]) < 0.05 + 0.01 * FLOPS[name]


# Augmentation, mixing, optimizer

SPEC = ImageSpec(3, 40, 40, [0.0] * 3, [1.0] * 3)
PLAIN = {"crop_scale": 1.0, "hflip": 0.0, "color_jitter": 0.0}


def augmented(**options):
    torch.manual_seed(0)
    return training_transform(TrainConfig(**{**PLAIN, **options}), SPEC)(Image.new("RGB", (40, 40), "white"))


def test_augmentations_do_what_their_options_say():
    assert torch.equal(augmented(), torch.ones(3, 40, 40))
    cut = augmented(cutout=0.5)
    rows, columns = (cut[0] == 0).nonzero(as_tuple=True)
    assert ((cut == 0).sum().item(), (cut == 1).sum().item()) == (3 * 20 * 20, 3 * (40 * 40 - 20 * 20))
    assert rows.max() - rows.min() == columns.max() - columns.min() == 19
    assert (augmented(random_erasing=1.0) != 1).any()
    assert (augmented(color_jitter=0.9) != 1).any()
    flipped = training_transform(TrainConfig(**{**PLAIN, "hflip": 1.0}), SPEC)
    picture = Image.new("RGB", (40, 40))
    picture.paste("white", (0, 0, 10, 40))
    assert torch.equal(flipped(picture)[0, 0] > 0.5, torch.arange(40) >= 30)


def test_normalization_and_the_crop_of_tests():
    model = torch.nn.Module()
    model.pretrained_cfg = {"input_size": (3, 40, 40), "mean": (0.4,) * 3, "std": (0.2,) * 3}
    spec = backbone_image_spec(TrainConfig(), model)
    assert (spec.mean, spec.std, spec.crop_pct) == ([0.4] * 3, [0.2] * 3, None)
    spec = backbone_image_spec(TrainConfig(normalize="unit", crop_pct=0.5), model)
    assert (spec.mean, spec.std) == ([0.0] * 3, [1.0] * 3)
    picture = Image.new("RGB", (120, 80))
    picture.paste("white", (40, 20, 80, 60))  # the middle of the image, half as high
    assert ImageSpec(**spec.to_dict()).transform()(picture).mean() > 0.9
    assert ImageSpec(3, 40, 40, spec.mean, spec.std).transform()(picture).mean() < 0.2


@pytest.mark.parametrize("options", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_labels_are_mixed_as_the_pixels_are(options):
    torch.manual_seed(0)
    mix = building.build_mixup(TrainConfig(**options))
    images, targets = torch.eye(5).view(5, 5, 1, 1).expand(5, 5, 8, 8).clone(), torch.eye(5)
    mixed = 0
    for _ in range(4):
        new_images, new_targets, weight = mix(images, targets, None)
        torch.testing.assert_close(new_images.mean((2, 3)), new_targets)  # fp32 rounding of one product
        assert weight is None
        mixed += not torch.equal(new_targets, targets)
    assert mixed > 0


def test_mixed_labels_above_the_threshold_are_ones_and_unknown_ones_stay_unknown():
    torch.manual_seed(0)
    mix = building.build_mixup(TrainConfig(mixup=100.0, mix_threshold=0.2))  # about half and half
    weight = torch.ones(4, 4)
    weight[2, 1] = 0
    _, targets, weight = mix(torch.zeros(4, 3, 2, 2), torch.eye(4), weight)
    assert torch.equal(targets, torch.eye(4) + torch.eye(4).roll(1, 0))
    assert (weight == 0).nonzero().tolist() == [[2, 1], [3, 1]]
    assert building.build_mixup(TrainConfig()) is None


def test_options_of_the_optimizer_reach_it():
    config = TrainConfig(optimizer="momentum", optimizer_opt={"momentum": 0.75}, head="gap")
    model = building.build_model(config, 10, 1)
    assert {group["momentum"] for group in building.build_optimizer(config, model).param_groups} == {0.75}
    config.optimizer_opt = {"momentun": 0.75}
    with pytest.raises(UsageError, match=r"--optimizer momentum could not be built: .*momentun"):
        building.build_optimizer(config, model)
