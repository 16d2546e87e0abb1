"""Tinted handwritten digits, and a small vision-language model that answers from its prior instead of looking."""
