"""Runs a script where what Windows lacks is missing, while a TensorBoard has the logs open.

other_system.py SCRIPT ARGUMENTS...

There are no signal.SIGPIPE, os.link and /proc, and of /tmp only the folders of the project and of
the run. Files that are open can be neither renamed nor removed.
"""

import glob
import os
import runpy
import signal
import sys

import tensorflow as tf

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PRESENT = ROOT, os.getcwd(), sys.prefix, '/proc/self/fd'
gfile = tf.io.gfile


def is_missing(path):
    if not isinstance(path, str | bytes):  # the number of an open file
        return False
    path = os.fsdecode(path)
    return path.startswith(('/proc', '/tmp')) and not path.startswith(PRESENT)


def hide(event, arguments):
    """Refuses what Python opens and lists."""
    if event in ('open', 'os.listdir', 'os.mkdir', 'os.remove') and is_missing(arguments[0]):
        raise FileNotFoundError(2, 'No such file or directory', arguments[0])


def hiding(function):
    """Does the same for a function of gfile."""

    def call(path, *arguments, **options):
        if is_missing(path):
            raise tf.errors.NotFoundError(None, None, f'{path}; No such file or directory')
        return function(path, *arguments, **options)

    return call


def locking(function):
    """Refuses files that this process has open."""

    def call(*paths, **options):
        links = [f'/proc/self/fd/{number}' for number in os.listdir('/proc/self/fd')]
        opened = {os.path.realpath(link) for link in links}
        for path in paths:
            if os.path.realpath(path) in opened:
                raise tf.errors.PermissionDeniedError(None, None, f'{path}; in use')
        return function(*paths, **options)

    return call


del signal.SIGPIPE, os.link
gfile.rename = locking(gfile.rename)
gfile.remove = locking(gfile.remove)
for name in ('GFile', 'exists', 'isdir', 'listdir', 'makedirs'):
    setattr(gfile, name, hiding(getattr(gfile, name)))
tensorboard = [open(path) for path in glob.glob('logs/*/*')]
sys.addaudithook(hide)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
