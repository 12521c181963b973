"""What of each kind of model does not go together, as the recipe alone shows it: everything is built that training will
build, on the meta device, where it takes no memory, and whatever can't be built is told.
"""
