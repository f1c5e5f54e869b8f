"""The parts a decoder is made of: single-device modules on packed [T, D]."""
