"""The kernels on CPU: MindSpore's operators for products, NumPy on several threads for the rest."""
