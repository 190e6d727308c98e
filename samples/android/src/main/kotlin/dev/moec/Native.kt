package dev.moec

/** A call that failed, with the reason in one line. The native side makes it of UTF-8. */
class MoecException internal constructor(utf8: ByteArray) : RuntimeException(String(utf8))

/**
 * The functions of moec_jni.cpp, which are those of moec.h. Objects are ids: numbers, none of which is used twice, so that a
 * closed one is an error. Texts are UTF-8.
 */
internal object Native {
    // Flags of moec.h.
    const val PLAIN = 1
    const val AS_TEXT = 2
    const val SPECIAL = 4
    const val SEGMENTS = 8
    const val TOOLS = 16

    init {
        System.loadLibrary("moec_jni")
    }

    @JvmStatic external fun open(folder: ByteArray, memoryBytes: Long, threads: Int): Long
    @JvmStatic external fun close(id: Long)

    /** The members of moec_app_info, in their order. */
    @JvmStatic external fun describe(artifact: Long): LongArray

    /** What the model recommends: `numbers` of `generate`, then top_k and speculate. */
    @JvmStatic external fun defaults(artifact: Long): DoubleArray
    @JvmStatic external fun tokenize(artifact: Long, text: ByteArray, flags: Int): IntArray
    @JvmStatic external fun detokenize(artifact: Long, ids: IntArray, flags: Int): ByteArray

    /**
     * texts: of each message its role, its content, and name and arguments of its calls, whose number is in `calls`. dropped: null,
     * or one number, which becomes that of the messages that were left out so that the others and `room` tokens fit.
     */
    @JvmStatic external fun chat(
        artifact: Long, tools: ByteArray?, texts: Array<ByteArray>, calls: IntArray, room: Long, dropped: LongArray?,
    ): IntArray
    @JvmStatic external fun session(artifact: Long): Long
    @JvmStatic external fun fork(session: Long): Long
    @JvmStatic external fun tokens(session: Long): IntArray
    @JvmStatic external fun rewind(session: Long, position: Long)
    @JvmStatic external fun save(session: Long, path: ByteArray)
    @JvmStatic external fun restore(session: Long, path: ByteArray)

    /** folder, name, tools, system: null for none. */
    @JvmStatic external fun prefixFolder(artifact: Long, folder: ByteArray?)
    @JvmStatic external fun keepPrefix(session: Long, name: ByteArray?)
    @JvmStatic external fun forgetPrefix(artifact: Long, name: ByteArray): Boolean
    @JvmStatic external fun prefixTokens(artifact: Long, name: ByteArray): Long
    @JvmStatic external fun prefixWarning(artifact: Long): ByteArray
    @JvmStatic external fun systemPrompt(artifact: Long, tools: ByteArray?, system: ByteArray?): IntArray

    /**
     * numbers: temperature, top_p, min_p, and the penalties for repetition, presence and frequency. biases: those of the
     * tokens at the same places of `biased`.
     */
    @JvmStatic external fun generate(
        artifact: Long, session: Long, prompt: IntArray, numbers: DoubleArray, topK: Int, speculate: Boolean, seed: Long,
        limit: Long, stops: Array<ByteArray>, biased: IntArray, biases: DoubleArray, segments: Int, topScores: Int,
        onFull: Int, keepFirst: Long, draft: Long, constraint: Constraint?,
    ): Long

    /** The next piece, whole characters; null at the end. */
    @JvmStatic external fun next(generation: Long): ByteArray?
    @JvmStatic external fun cancel(generation: Long)

    /** The members of moec_app_stats, in their order. */
    @JvmStatic external fun stats(generation: Long): DoubleArray

    /** The members of every moec_app_score, in their order. */
    @JvmStatic external fun scores(generation: Long): DoubleArray
    @JvmStatic external fun splitter(artifact: Long, prompt: IntArray, segments: Int): Long

    /** piece null: the answer has ended. */
    @JvmStatic external fun split(splitter: Long, piece: ByteArray?)

    /** The next segment as its kind (a byte), and its text or the name and arguments of a call; null: more is needed. */
    @JvmStatic external fun segment(splitter: Long): Array<ByteArray>?
}
