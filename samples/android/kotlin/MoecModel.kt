package dev.moec

import java.io.Closeable
import java.io.File

/**
 * One artifact (`moec compile --target xnnpack`) with its KV cache: token ids in, logits out. Tokenizing is the
 * application's. Not thread-safe, and slow for the main thread: use it from one background dispatcher.
 */
class MoecModel(artifact: File) : Closeable {
    private var handle: Long
    val vocabSize: Int
    val context: Int
    private val maxTokens: Int
    var position = 0
        private set

    init {
        // A file inside an APK cannot be mapped where it lies: install the artifact into filesDir first.
        val file = File(artifact, "model.pte")
        require(file.isFile) { "$file is not there" }
        handle = open(file.path)
        vocabSize = vocabSize(handle).toInt()
        context = context(handle).toInt()
        maxTokens = maxTokens(handle).toInt()
    }

    /** Append tokens; the logits of the last one. Longer prompts go through in chunks. */
    fun append(ids: LongArray): FloatArray {
        check(handle != 0L) { "the model is closed" }
        require(ids.isNotEmpty()) { "the prompt is empty" }
        require(position + ids.size <= context) { "${ids.size} tokens do not fit: position $position of $context" }
        require(ids.all { it in 0 until vocabSize }) { "a token id is not in the vocabulary of $vocabSize" }
        var logits = FloatArray(0)
        for (begin in ids.indices step maxTokens) {
            val chunk = ids.copyOfRange(begin, minOf(begin + maxTokens, ids.size))
            logits = forward(handle, chunk, position.toLong())
            position += chunk.size
        }
        return logits
    }

    /** Start another conversation: attention ends at the current position, so the cache need not be cleared. */
    fun reset() {
        position = 0
    }

    /** Greedy generation until `stop`, `limit` tokens, the end of the context, or `each` returns false. */
    fun generate(prompt: LongArray, limit: Int, stop: Set<Long>, each: (Long) -> Boolean) {
        var logits = append(prompt)
        repeat(limit) {
            val token = logits.indices.maxBy { logits[it] }.toLong()
            if (token in stop || !each(token) || position == context) return
            logits = append(longArrayOf(token))
        }
    }

    override fun close() {
        if (handle != 0L) close(handle)
        handle = 0L
    }

    companion object {
        init {
            System.loadLibrary("moec_jni")
        }

        @JvmStatic private external fun open(path: String): Long
        @JvmStatic private external fun close(handle: Long)
        @JvmStatic private external fun vocabSize(handle: Long): Long
        @JvmStatic private external fun context(handle: Long): Long
        @JvmStatic private external fun maxTokens(handle: Long): Long
        @JvmStatic private external fun forward(handle: Long, ids: LongArray, start: Long): FloatArray
    }
}
