"""Moving an adapter to another base with data that the models make themselves (Trans-LoRA, arXiv 2405.17258)."""
