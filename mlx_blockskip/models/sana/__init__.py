"""SANA (NVIDIA, MIT): linear attention over few, deep latents; 0.6B, 1.6B and 4.8B, SANA 1.5 and Sprint."""

ATTENTION = {
    "sana": tuple(
        f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")
    )
}
FEED_FORWARD = {"sana": ("ff.conv_inverted", "ff.conv_point")}
