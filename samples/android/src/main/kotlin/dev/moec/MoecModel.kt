package dev.moec

import java.io.Closeable
import java.io.File

/** What is known of a model. */
data class Info(
    val hasChat: Boolean, // conversations can be rendered
    val vocabulary: Int,
    val context: Int,
    val threads: Int,
    val rewinds: Boolean, // conversations go back to any position; false: to their beginning only
    val hasCalls: Boolean, // the model's way to write calls of tools is known
    val thinks: Boolean,
    val speculates: Boolean,
    val hasTools: Boolean, // conversations with tools can be rendered
)

/**
 * One artifact (`moec compile --target xnnpack`) for any number of conversations, which share its weights and take turns. All calls
 * are slow for the main thread: use a background dispatcher. What fails is a MoecException with the reason.
 *
 * artifact: its folder; a file inside an APK cannot be mapped where it lies, so install it into filesDir first. memoryBytes: the
 * most memory of the process; 0 for no budget. threads: 0 for one on each fast core.
 */
class MoecModel(artifact: File, memoryBytes: Long = 0, threads: Int = 0) : Closeable {
    internal val id = Native.open(artifact.path.toByteArray(), memoryBytes, threads)
    val info: Info

    /** What the model recommends, for every setting that is null in `Settings()`. */
    val recommended: Settings

    init {
        try {
            val known = Native.describe(id)
            info = Info(
                hasChat = known[0] != 0L, vocabulary = known[1].toInt(), context = known[2].toInt(), threads = known[3].toInt(),
                rewinds = known[4] != 0L, hasCalls = known[5] != 0L, thinks = known[6] != 0L, speculates = known[7] != 0L,
                hasTools = known[8] != 0L,
            )
            val given = Native.defaults(id)
            recommended = Settings(
                temperature = given[0], topP = given[1], minP = given[2], repeatPenalty = given[3], presencePenalty = given[4],
                frequencyPenalty = given[5], topK = given[6].toInt(), speculate = given[7] != 0.0,
            )
        } catch (fault: Throwable) {
            Native.close(id) // nobody has the object that would be closed
            throw fault
        }
    }

    /** A new conversation. Close it; the model stays open for it. */
    fun conversation(): Conversation = Conversation(this, Native.session(id))

    /** plain: without the tokens that the tokenizer puts around every text; asText: special tokens in the text are text. */
    fun tokenize(text: String, plain: Boolean = false, asText: Boolean = false): IntArray =
        Native.tokenize(id, text.toByteArray(), (if (plain) Native.PLAIN else 0) or (if (asText) Native.AS_TEXT else 0))

    /** special: special tokens are written out. */
    fun textOf(ids: IntArray, special: Boolean = false): String = String(Native.detokenize(id, ids, if (special) Native.SPECIAL else 0))

    /** Where beginnings of prompts are kept, and found by every answer; null: nowhere. The folder is created if it is missing. */
    fun keepPrefixesIn(folder: File?) = Native.prefixFolder(id, folder?.path?.toByteArray())

    /** Whether there was a prefix of this name. */
    fun forgetPrefix(name: String): Boolean = Native.forgetPrefix(id, name.toByteArray())

    /** How many tokens the prefix of a name has; 0 if there is none. */
    fun prefixTokens(name: String): Long = Native.prefixTokens(id, name.toByteArray())

    /** Why a prefix was not used, the latest one; empty if all were. */
    val prefixWarning: String get() = String(Native.prefixWarning(id))

    /** What every conversation with this system prompt and these tools begins with. */
    fun systemPrompt(system: String?, tools: String? = null): IntArray = Native.systemPrompt(id, tools?.toByteArray(), system?.toByteArray())

    override fun close() = Native.close(id)
}
