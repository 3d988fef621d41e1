"""All that a launcher and its ranks say to each other: places, signs of life, messages, signals. Without torch."""
