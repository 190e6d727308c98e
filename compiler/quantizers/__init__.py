"""Methods of quantization, a file each: it holds `QUANTIZER`, and its name is the method's name in a spec."""
