"""The MindSpore backend: PyNative mode, one process, CPU here and Ascend NPUs.

It does not use the framework's autograd. A differentiable function returns its value and a pullback: a function from
the value's gradient to the input's gradient. A pullback also adds the gradients of weights to their buffers
(`weight.Weight`).
"""

import os

# MindSpore reads this when it is first imported; without it, every start prints a page of warnings.
os.environ.setdefault("GLOG_v", "3")
