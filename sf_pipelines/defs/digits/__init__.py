"""The demo: handwritten digits of scikit-learn, 64 pixels each, with their labels."""
