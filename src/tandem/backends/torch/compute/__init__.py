"""The functions of each kind of device."""
