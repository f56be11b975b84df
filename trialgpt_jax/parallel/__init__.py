"""The parallel wing: what the chips are, and how arrays lie on them."""
