"""One step ahead: rollout i + 1 is generated while i trains, by the weights before; these are pushed between.

python train_async.py --hf-checkpoint DIR --prompt-data FILE --rm-type math ...      (the flags of train.py)
"""

import sys

from miles.cluster import App, run


def train(app: App) -> None:
    app.publish_weights(app.start)
    app.evaluate_if_due(app.start)
    app.finish_step(app.start)
    for rollout_id in app.rollouts():
        step = rollout_id + 1
        batch = app.generate(rollout_id)
        app.generate_ahead(step)
        app.train(rollout_id, batch)
        app.await_ahead()
        app.publish_weights(step)
        app.evaluate_if_due(step)
        app.finish_step(step)
        app.save_if_due(step)


if __name__ == "__main__":
    sys.exit(run(train, rollouts_ahead=1))
