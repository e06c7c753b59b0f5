"""A worker of the tf.data service whose dispatcher is at an address: worker.py HOST:PORT."""

import sys

import tensorflow as tf

service = tf.data.experimental.service
server = service.WorkerServer(service.WorkerConfig(dispatcher_address=sys.argv[1]))
print('The worker is up.')
server.join()
