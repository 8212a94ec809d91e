"""The frozen LM, augmented with perceptual tokens and a soft prompt (paper, section 3.1)."""
