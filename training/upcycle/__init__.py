"""From a pretrained dense model to a mixture of experts."""
