"""From text to tokens and back: no Ray."""
