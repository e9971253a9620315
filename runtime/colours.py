"""One colour for one thing, in every figure and on every page."""

COLOUR = {
    "adapter": "#d1495b",  # v, and the policy that it makes
    "sae": "#3d6b8e",  # f
    "base": "#7a7a7a",  # the model without steering
    "chosen": "#2a9d6f",
    "rejected": "#d98032",
    "prompt": "#9aa0a6",
    "named": "#7a5195",  # the category that the audit names
    "other": "#b9b3c4",  # the other categories
    "control": "#9aa7b1",  # random features
    "matched": "#5d6d7e",  # features of like usage
    "train": "#7a7a7a",
    "eval": "#222222",
    "warning": "#b3303f",
}
