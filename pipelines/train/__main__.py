"""`python -m pipelines.train RECIPE MODEL`, also under torchrun: see `pipelines.commands.torchrun`.

By name, since a stage imports nothing of what knows the stages' order.
"""

import runpy

runpy.run_module("pipelines.commands.torchrun", run_name="__main__", alter_sys=True)
