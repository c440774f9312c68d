"""What a model is: hyper-parameters, tensor table, weight map, rotary frequencies, FLOPs. NumPy only."""
