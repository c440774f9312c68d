"""The MindSpore backend: PyNative mode, one process, CPU here and Ascend NPUs.

No framework autograd: a differentiable function returns its value together with a function from the value's gradient
to its input's gradient, and adds its weights' gradients to their buffers on the way (`weight.Weight`).
"""

import os

# MindSpore reads this when it is first imported; without it, every start prints a page of warnings.
os.environ.setdefault("GLOG_v", "3")
