"""What all pictures share: the name and colour of each method, and matplotlib's settings."""

# Okabe's and Ito's palette suits any kind of colour vision.
STYLES = {
    "sgd": ("SGD", "#0072B2"),
    "adam": ("Adam", "#E69F00"),
    "radam": ("RAdam", "#009E73"),
    "adam_adj": ("Adam-adj", "#CC79A7"),
    "radam_adj": ("RAdam-adj", "#56B4E9"),
    "apollo": ("Apollo", "#D55E00"),
}
OTHER_COLOURS = ("#000000", "#8C6D31", "#7F7F7F", "#6A3D9A", "#B8A800")
LOOK = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
}
