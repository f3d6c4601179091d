"""What is optimised and how it predicts."""

from recscale.tasks import next_item

TASKS = {"next_item": next_item}
