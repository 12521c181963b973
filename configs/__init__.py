"""Recipes (YAML) that ship with the package; read them with `importlib.resources`."""
