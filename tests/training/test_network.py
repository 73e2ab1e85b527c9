"""Networks: presets, sizes that fit, and what is refused."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel

from exact_networks import small_unet
from stf_diffusers import EDM
from stf_diffusers.export import diffusers_pipeline, save_pipeline
from stf_diffusers.training.network import PRESETS, compute_channels_last, new_network, pretrained_network
from tiny import TINY, TINY_TRANSFORMER


@pytest.fixture
def config(tmp_path):
    """config(dictionary): the path of a file that holds it."""

    def write(content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        return str(tmp_path / "config.json")

    return write


@pytest.mark.parametrize(
    ("preset", "millions"), [("cifar10_32", (55, 57)), ("celeba_64", (60, 64)), ("digits_12", (0.5, 1.5))]
)
def test_presets_have_the_stated_size(preset, millions):
    with torch.device("meta"):
        unet = UNet2DModel.from_config(json.loads(PRESETS[preset].read_text()))
    assert millions[0] < unet.num_parameters() / 1e6 < millions[1]


@pytest.mark.parametrize("side", [12, 16])
def test_small_images_get_the_preset_for_their_size(side):
    network, _ = new_network((1, side, side))
    expected = json.loads(PRESETS["digits_12"].read_text())
    assert tuple(network.config["block_out_channels"]) == tuple(expected["block_out_channels"])
    assert (network.config["sample_size"], network.config["in_channels"]) == (side, 1)


@pytest.mark.parametrize(
    ("conditions", "embeddings"),
    [({}, None), ({"num_classes": 3}, 3), ({"num_classes": 3, "class_dropout": 0.1}, 4), ({"reorient": 0.5}, 8),
     ({"num_classes": 3, "class_dropout": 0.1, "reorient": 0.5}, 32)],
)  # fmt: skip
def test_a_network_has_an_embedding_for_each_condition(conditions, embeddings, config):
    network, conditioning = new_network((3, 8, 8), model_config=config(TINY), **conditions)
    assert network.config["num_class_embeds"] == conditioning.embeddings == embeddings
    assert (network.config["sample_size"], network.config["out_channels"]) == (8, 3)


def test_a_transformer_does_not_drop_labels_by_itself(config):
    """Diffusers' drops a tenth of them in training, in each block anew, unseen by the targets."""
    network, _ = new_network((4, 4, 4), model_config=config(TINY_TRANSFORMER), num_classes=2)
    stock = DiTTransformer2DModel.from_config(network.config)
    x, t, labels = torch.randn(64, 4, 4, 4), torch.full((64,), 500.0), torch.zeros(64, dtype=torch.int64)

    def embeddings(model):
        model.train()
        embed = model.transformer_blocks[0].norm1.emb
        return embed(t, labels, hidden_dtype=x.dtype)

    assert torch.equal(embeddings(network), embeddings(network)[:1].expand(64, -1))
    assert not torch.equal(embeddings(stock), embeddings(stock)[:1].expand(64, -1))


@pytest.mark.parametrize(
    ("content", "shape", "message"),
    [
        (TINY, (3, 9, 9), "must be a multiple of 2"),
        (TINY | {"time_embedding_type": "fourier"}, (3, 8, 8), "use 'positional'"),
        (TINY_TRANSFORMER, (4, 5, 5), "patch_size 2"),
        ({"_class_name": "AutoencoderKL"}, (3, 8, 8), "must be the config of a UNet2DModel or a DiTTransformer2DModel"),
        ([], (3, 8, 8), "it holds a list, not an object"),
    ],
)
def test_configs_that_do_not_fit(content, shape, message, config):
    with pytest.raises(ValueError, match=message):
        new_network(shape, model_config=config(content))
    with pytest.raises(ValueError, match=r"neither a preset .* nor a readable JSON file"):
        new_network(shape, model_config="nowhere.json")


def test_a_pretrained_network_keeps_its_weights_and_fits_or_is_refused(tmp_path):
    saved = small_unet(3)
    metadata = {"num_classes": None, "class_dropout": 0.0, "reorient": 0.0}
    save_pipeline(diffusers_pipeline(saved, EDM(), metadata=metadata), tmp_path / "good")
    network, _ = pretrained_network(str(tmp_path / "good"), (3, 16, 16))
    assert network.config["sample_size"] == 16
    assert all(map(torch.equal, network.state_dict().values(), saved.state_dict().values()))
    for shape, conditions, message in (
        ((1, 8, 8), {}, "has 3 channels and the images have 1"),
        ((3, 8, 8), {"num_classes": 2}, "num_classes was None and is 2"),
        ((3, 8, 8), {"reorient": 0.5}, "reorient was 0.0 and is 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrained_network(str(tmp_path / "good"), shape, **conditions)
    with torch.no_grad():
        saved.conv_in.weight[0, 0, 0, 0] = torch.nan
    save_pipeline(diffusers_pipeline(saved, EDM()), tmp_path / "broken")
    with pytest.raises(ValueError, match="weights are not finite"):
        pretrained_network(str(tmp_path / "broken"), (3, 8, 8))


def test_channels_last_in_the_network_alone():
    """Its layers get them, and neither its weights nor their gradients are in another order."""
    network, seen = small_unet(3, 8), []
    images, times = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2)
    before = network(images, times).sample
    network.mid_block.resnets[0].conv1.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    compute_channels_last(network)
    after = network(images, times).sample
    assert torch.equal(network(sample=images, timestep=times).sample, after)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    after.square().sum().backward()
    assert all(weight.is_contiguous() for weight in network.state_dict().values())
