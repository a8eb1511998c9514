#!/usr/bin/env python3
"""Puts checkpoints into an object storage with its vendor's own client, for ../storage_fidelity.sh.

  objects.py put s3|az BUCKET PREFIX DIR            the files of DIR as BUCKET/PREFIX/NAME, in a bucket that is made if need be
  objects.py replace s3|az BUCKET PREFIX DIR DIR    the file in which they differ, one and the other in turn, until it is ended

Where the storage is and who asks comes from the environment, as for longshore itself.
"""
import os
import sys
import time


class S3:
    def __init__(self, bucket):
        import boto3
        self.client, self.bucket = boto3.client("s3"), bucket

    def make(self):
        self.client.create_bucket(Bucket=self.bucket)

    def put(self, name, content):
        self.client.put_object(Bucket=self.bucket, Key=name, Body=content)


class Azure:
    def __init__(self, bucket):
        from azure.storage.blob import ContainerClient
        account = {"account_name": os.environ["AZURE_STORAGE_ACCOUNT_NAME"], "account_key": os.environ["AZURE_STORAGE_ACCOUNT_KEY"]}
        self.client = ContainerClient(os.environ["AZURE_STORAGE_ENDPOINT"], bucket, credential=account)

    def make(self):
        self.client.create_container()

    def put(self, name, content):
        self.client.upload_blob(name, content, overwrite=True)


def files(directory):
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name), "rb") as f:
            yield name, f.read()


def main():
    verb, service, bucket, prefix, *directories = sys.argv[1:]
    storage = {"s3": S3, "az": Azure}[service](bucket)
    if verb == "put":
        storage.make()
        for name, content in files(directories[0]):
            storage.put(f"{prefix}/{name}", content)
        return
    one, other = (dict(files(d)) for d in directories)
    [name] = [name for name in one if one[name] != other[name]]
    while True:
        for content in one[name], other[name]:
            storage.put(f"{prefix}/{name}", content)
            time.sleep(0.2)  # some loads fit in between


if __name__ == "__main__":
    main()
