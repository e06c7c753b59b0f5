"""Trains, and waits only a second for a tf.data service that does not answer."""

import tf_retrain

tf_retrain.DATA_SERVICE_TIMEOUT = 1
tf_retrain.run(tf_retrain.main, tf_retrain.parse_flags(tf_retrain.create_parser()))
