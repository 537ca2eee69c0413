"""Films of a training, and the callbacks that record them: ``foveate.film.Film``; they live in ``foveate.training``."""

from foveate.training.film import Film as Film
from foveate.training.film import hugging_face_callback as hugging_face_callback
from foveate.training.film import lightning_callback as lightning_callback
