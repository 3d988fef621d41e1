def test_rank_0s_records_reach_every_rank(on_ranks):
    assert on_ranks(3, "broadcasting") == [[None, 1.5, "é", {"a": [1, 2]}, ""]] * 3


def test_a_failure_of_rank_0_is_every_ranks_failure(on_ranks):
    first, *others = on_ranks(3, "failing_on_the_first")
    assert first["full"] == ["StorageError", "/somewhere cannot be written: No space left on device."]
    assert first["damaged"] == ["CheckpointError", "it is damaged"]
    assert first["value"] == 42
    for seen in others:
        assert (seen["full"], seen["damaged"], seen["value"]) == (first["full"], first["damaged"], None)


def test_ranks_with_other_data_are_named_on_every_rank(on_ranks):
    for rank, message in enumerate(on_ranks(3, "disagreeing")):
        assert "not the same data: rank 2 differs from rank 0" in message
        assert f"Rank {rank} has {'other' if rank == 2 else 'usual'}" in message
