"""Gradients of LoRA through a whole network, ours against PEFT's layers in the reference."""

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import philox, sweep
from mlx_blockskip.engine.sweep import Batch
from support.compare import assert_parity


def assert_gradients_equal(name, model, reference, tree, given, theirs_for, prompt):
    """Loss and every gradient. tree: factors, which the reference gets too. given: latents, text and sigma, as numpy.
    theirs_for: `(reference, *given) -> velocity` in torch; prompt: the same text as the model takes it. Returns the
    gradients by block.
    """
    import torch
    from peft import LoraConfig

    prefix = {i: model.stack.block(i).prefix for i in tree}
    modules = {f"{prefix[i]}{factor[:-7]}" for i in tree for factor in tree[i]}
    reference.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=sorted(modules)))
    factors = {}
    with torch.no_grad():
        for i, own in tree.items():
            for factor, value in own.items():
                module = reference.get_submodule(f"{prefix[i]}{factor[:-7]}")
                side = module.lora_A if factor.endswith("a") else module.lora_B
                side["default"].weight.copy_(torch.from_numpy(np.array(value.T)))
                factors[i, factor] = side["default"].weight
    latents, _, sigma = given
    target = philox.normal(4, shape=latents.shape)
    loss = ((theirs_for(reference, *given) - torch.from_numpy(target)) ** 2).mean()
    loss.backward()
    grads = {}
    context = model.context(mx.array(sigma), prompt, latents.shape[1:3], 1.0)
    modulation = model.final_modulation(context)
    (own_loss,) = sweep.backward(
        model.stack,
        model.reader,
        [Batch(model.embed(mx.array(latents), prompt), context)],
        model.stack.path,
        trainable=tree,
        loss=lambda i, t: mx.mean(mx.square(model.final_layer(t, context, modulation) - mx.array(target))),
        on_grad=grads.__setitem__,
    )
    assert_parity(f"{name} loss", own_loss, loss.detach().numpy())
    assert len(factors) == sum(map(len, grads.values()))
    for (i, factor), weight in factors.items():
        assert_parity(f"{name} gradients of LoRA", grads[i][factor], weight.grad.T.numpy())
    return grads
