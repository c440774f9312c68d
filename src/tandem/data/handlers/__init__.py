"""Records of raw data into text, conversations or preferences."""
