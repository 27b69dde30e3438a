"""Small random autoencoders made by diffusers, and the same weights as ours."""

from mlx_blockskip.converters import run, write
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.engine.shards import Shards


def random_autoencoder(path, cls, config, component, config_class):
    """(the reference, whose norms and biases are random too; our weights; its config). component: its table of rows.

    config_class: ours.
    """
    import torch

    torch.manual_seed(0)
    model = cls(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path / "hf")
    config = config_class.read(path / "hf" / "config.json")
    made, source = component("hf", config), open_source(path / "hf")
    run.check_rows(made, source)
    (path / "mlx").mkdir()
    list(write.write_component(made, source, path / "mlx", write.Precision("float32")))
    shards = Shards(path / "mlx")
    return model, shards.load(shards.names), config
