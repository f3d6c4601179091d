"""What is optimised and how it predicts."""

from recscale.tasks import denoising, feedback, next_item, semantic_id, two_tower

TASKS = {
    "next_item": next_item,
    "feedback": feedback,
    "two_tower": two_tower,
    "semantic_id": semantic_id,
    "denoising": denoising,
}
