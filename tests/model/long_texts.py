"""config.model of layers that a method stretches to longer texts."""

import tiny

TRAINED = 16  # tokens


def spec(**overrides):
    """config.model of layers that rotate by time alone."""
    fields = dict(ratio=0.0, unselected="time", stride=128, theta=100.0, trained=TRAINED)
    made = tiny.config(**{f"model__position__{name}": value for name, value in fields.items()})
    made.model.rule = "causal"
    for name, value in overrides.items():
        node = made.model
        *path, last = name.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return made.model


def of_map(name: str, **options):
    return spec(position__map__name=name, **{f"position__map__{key}": value for key, value in options.items()})
