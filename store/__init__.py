"""The feature store: the encoders' tokens on disk, named by what made them."""
