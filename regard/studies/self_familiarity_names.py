"""Famous names of the study `self-familiarity`: pairs whose second words change places, and single words."""

from __future__ import annotations

PAIRS = (
    ("Ludwig Beethoven", "Frederic Chopin"),
    ("Salvador Dali", "Claude Monet"),
    ("Isaac Newton", "Marie Curie"),
    ("Albert Einstein", "Charles Darwin"),
    ("William Shakespeare", "Jane Austen"),
    ("Mark Twain", "Leo Tolstoy"),
    ("Julius Caesar", "Napoleon Bonaparte"),
    ("Abraham Lincoln", "George Washington"),
    ("Winston Churchill", "Nelson Mandela"),
    ("Christopher Columbus", "Marco Polo"),
    ("Mount Everest", "Grand Canyon"),
    ("Eiffel Tower", "Golden Gate"),
    ("Amazon River", "Sahara Desert"),
    ("Niagara Falls", "Suez Canal"),
    ("Taj Mahal", "Big Ben"),
    ("Great Britain", "South Africa"),
    ("Saudi Arabia", "New Zealand"),
    ("Costa Rica", "Sri Lanka"),
    ("Hong Kong", "San Francisco"),
    ("blue whale", "polar bear"),
    ("honey bee", "guinea pig"),
    ("natural selection", "plate tectonics"),
    ("black hole", "solar system"),
    ("periodic table", "nuclear reactor"),
    ("general relativity", "quantum mechanics"),
    ("First Amendment", "Magna Carta"),
    ("Berlin Wall", "Cold War"),
    ("stock market", "interest rate"),
    ("Star Wars", "Harry Potter"),
    ("heart attack", "blood pressure"),
)

SINGLES = (
    "Mozart", "Vivaldi", "Tchaikovsky", "Rachmaninoff", "Aristotle", "Confucius", "Voltaire", "Dostoevsky",
    "Botticelli", "Copernicus", "Galileo", "Pythagoras", "Archimedes", "Gandhi", "Hercules", "Pompeii",
    "Antarctica", "Kilimanjaro", "Hollywood", "Hiroshima", "Chernobyl", "Versailles", "Mesopotamia",
    "Pokemon", "Minecraft", "Buddhism", "Hinduism", "mitochondria", "kangaroo", "crocodile", "hippopotamus",
    "giraffe", "chimpanzee", "pneumonia", "tuberculosis", "thermodynamics", "trigonometry", "logarithm",
    "cryptocurrency", "helicopter", "saxophone", "rhinoceros", "chameleon",
)  # fmt: skip
"""Three tokens or more each, so that an invented name can have as many."""
