"""Drawing with one compiled function for the whole step, on a CPU: the same pictures as the PyTorch step, much sooner."""
